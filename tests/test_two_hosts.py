"""Two hosts on one machine: network namespaces joined by a veth pair, one torchrun in each, real shards."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_faults import named, pretraining, start, wait_for_row
from tests.train.test_runs import assert_same
from tests.train_helpers import ROOT, arguments
from train.config import Config

pytestmark = [pytest.mark.fault, pytest.mark.long]
HOSTS = {"hiera-a": "10.99.0.1", "hiera-b": "10.99.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces with an address each; skips where they may not be made."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need ip and root")
    if len(os.sched_getaffinity(0)) != 2:
        pytest.skip("the two hosts get one core each, to be compared with two processes on two cores")
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "veth0", "netns", "hiera-a", "type", "veth", "peer", "veth0", "netns", "hiera-b")
        for host, address in HOSTS.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "veth0")
            ip("-n", host, "link", "set", "veth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def start_on(host: str, config: Config, log: Path) -> subprocess.Popen:
    """What `make train-mae NODES=2` starts on a host."""
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "veth0"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS['hiera-a']}:29400", "--rdzv-id", "x"]
    # A namespace shares its parent's host name, by which torchrun would know where the meeting point is.
    place = ["--rdzv-conf", f"is_host={int(host == 'hiera-a')}", "--local-addr", HOSTS[host]]
    words = [*torchrun, *meeting, *place, "-m", "train.mae", "image-mae-pico"]
    # One core each, as the two processes of one host have: sums depend on the number of threads.
    cores = sorted(os.sched_getaffinity(0))
    command = [
        "ip",
        "netns",
        "exec",
        host,
        "taskset",
        "-c",
        str(cores[host == "hiera-b"]),
        *words,
        *arguments(config),
    ]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def start_both(config: Config) -> list[subprocess.Popen]:
    return [start_on(host, config, config.run.root / f"{host}.log") for host in HOSTS]


def printed(config: Config) -> str:
    return "".join((config.run.root / f"{host}.log").read_text() for host in HOSTS)


def finish(processes: list[subprocess.Popen], config: Config, limit: float = 240) -> list[int]:
    deadline = time.monotonic() + limit
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(printed(config)) from None
    return codes


def ask_to_end(processes: list[subprocess.Popen]) -> str:
    """As a scheduler does: SIGTERM, and SIGKILL 20 s later. A torchrun may hang: docs/cluster.md."""
    for process in processes:
        process.terminate()
    deadline, killed = time.monotonic() + 20, 0
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
    return f"{killed} torchrun did not hear SIGTERM; "


@pytest.mark.parametrize("cut", [0.0, 30.0, float("inf")], ids=["never", "30 s", "for good"])
def test_two_hosts_and_a_link_that_is_cut(
    cut: float, hosts: None, images: Path, tmp_path: Path, happened: Callable[[str], None]
):
    """bit-equal to one host of two processes; after a cut the same commands go on"""
    config = named(pretraining(images, tmp_path, "run", 2, epochs=9.0), "run", log_every=1)
    timeout = 90.0 if cut == 30.0 else 15.0
    config = replace(config, speed=replace(config.speed, processes=1, timeout=timeout))
    one_host = named(replace(config, speed=replace(config.speed, processes=2)), "whole")
    assert start(one_host).wait(120) == 0
    processes = start_both(config)
    words = "" if cut else "not cut"
    if cut:
        wait_for_row(config, 6)
        ip("-n", "hiera-a", "link", "set", "veth0", "down")
        begin = time.monotonic()
        if cut == 30.0:
            time.sleep(cut)
            ip("-n", "hiera-a", "link", "set", "veth0", "up")
        else:
            while printed(config).count("another process ended, or did not answer") < 2:
                assert time.monotonic() < begin + 90, printed(config)
                time.sleep(0.5)
            words = f"both processes ended after {time.monotonic() - begin:.0f} s; "
            words += ask_to_end(processes)
        codes = finish(processes, config)
        words += f"exit codes {codes} after {time.monotonic() - begin:.0f} s"
        if cut > 30.0:
            assert all(codes)
            ip("-n", "hiera-a", "link", "set", "veth0", "up")
        if any(codes):
            processes = start_both(config)
            words += ", resumed"
    assert finish(processes, config) == [0, 0], printed(config)
    assert_same(tmp_path / "run", tmp_path / "whole")
    happened(f"{words}, bit-equal")
