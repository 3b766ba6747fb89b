"""Packing on several machines: parts and Ray write the bytes of one machine; bad nodes are named."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.errors import INTERRUPTED, UserError
from tests.test_project import requirements
from tests.tools.test_pack import ROOT, clip_tree, image_tree, pack_images, sums
from tools.clips import load_image
from tools.executors import pack_on_node, wait_until_seen
from tools.pack import ImageOptions, plan_images
from tools.packing import begin
from tools.shards import PLAN_FILE, Job, jobs_of


def start(source: Path, out: Path, *words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.pack", "images", "--source", source, "--out", out]
    command += ["--shard-size", 2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command), *map(str, words)], cwd=ROOT, **pipes)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def test_ctrl_c_while_workers_start_prints_one_line(tmp_path):
    """The fork server printed a traceback while it imported what workers need."""
    clip_tree(tmp_path, {"train": [("a", "v"), ("a", "u")], "val": [("a", "w")]}, frames=2)
    words = ["--frames", tmp_path / "frames", "--out", tmp_path / "out", "--workers", 2, "--shard-size", 1]
    command = [sys.executable, "-m", "tools.pack", "clips", *map(str, words)]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # background processes may ignore SIGINT
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, process_group=0)
    signal.signal(signal.SIGINT, before)

    def server_imports() -> bool:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        servers = [n for n in children if b"forkserver" in Path(f"/proc/{n}/cmdline").read_bytes()]
        return any("libavcodec" in Path(f"/proc/{n}/maps").read_text() for n in servers)

    wait_for(server_imports)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in printed
    assert printed.splitlines()[-1] == INTERRUPTED


# ---- parts -----------------------------------------------------------------------------------------------


def test_parallel_parts_and_a_last_run_write_the_bytes_of_one_run(tmp_path):
    source = image_tree(tmp_path / "source", train=40, val=10, size=(500, 400))
    pack_images(source, tmp_path / "one", shard_size=2)
    out = tmp_path / "parts"
    parts = [start(source, out, "--workers", 1, "--shard-range", f"{i}/3") for i in (1, 2, 3)]

    def at_work(part: int) -> bool:
        return any(int(path.stem) % 3 == part for path in out.glob("train/*.parquet"))

    wait_for(lambda: at_work(0) or at_work(2))
    first, last = (0, 2) if at_work(0) else (2, 0)  # each is struck before it can finish
    strikes = {0: signal.SIGSTOP, 2: signal.SIGKILL}  # SIGKILL leaves its temporary file
    parts[first].send_signal(strikes[first])
    wait_for(lambda: at_work(last))
    parts[last].send_signal(strikes[last])
    with pytest.raises(UserError, match=r"another process is packing into .*parts; wait for it"):
        pack_images(source, out, shard_size=2)
    parts[0].send_signal(signal.SIGCONT)
    for part in parts[:2]:
        said, errors = part.communicate(timeout=120)
        assert part.returncode == 0, errors
        assert "of 3 of" in said and "run this without --shard-range" in said
    parts[2].communicate()
    assert not (out / "dataset.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.tar")}
    numbers = sorted(int(path.stem) for path in out.glob("train/*.tar"))
    assert {number for number in range(60) if number % 3 != 2} <= {*numbers}, "two parts are whole"
    assert len(numbers) < 60, "and packed nothing of the third"
    assert pack_images(source, out, shard_size=2, shard_range="3/3") == 0
    assert pack_images(source, out, shard_size=2) == 0
    after = {path: path.stat().st_mtime_ns for path in out.glob("*/*.tar")}
    assert before.items() <= after.items() and len(after) == 75, "no shard was packed twice"
    assert sums(out) == sums(tmp_path / "one")
    assert pack_images(source, out, shard_size=2, shard_range="1/3") == 0
    assert sums(out) == sums(tmp_path / "one"), "a late part leaves a finished dataset alone"


def test_of_two_plans_started_together_only_one_is_used(tmp_path):
    source = image_tree(tmp_path / "source", train=2, val=1)
    plans = [plan_images(source, ImageOptions(short_side=side)) for side in (100, 200)]
    for attempt in range(40):
        began: list[int] = []
        barrier, leave = threading.Barrier(8), threading.Event()

        def attempt_of(number: int, out: Path, began=began, barrier=barrier, leave=leave) -> None:
            barrier.wait()
            with suppress(UserError), begin(plans[number % 2], out, False):
                began.append(number % 2)
                leave.wait(20)

        threads = [threading.Thread(target=attempt_of, args=(n, tmp_path / str(attempt))) for n in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda began=began, threads=threads: sum(t.is_alive() for t in threads) == len(began) > 0)
        leave.set()
        for thread in threads:
            thread.join()
        assert len(began) == 4 and len({*began}) == 1, "all of one plan and none of the other"


@pytest.mark.parametrize("wrong", ["0/3", "4/3", "1", "a/b", "1/3/5", "-1/3", "1/0", "1 /3"])
def test_a_wrong_range_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=r"--shard-range is .*; it must be i/n with i from 1 to n\.$"):
        pack_images(tmp_path, tmp_path / "out", shard_range=wrong)


# ---- nodes -----------------------------------------------------------------------------------------------


def one_job(folder: Path) -> Job:
    source, out = image_tree(folder / "source", train=1, val=1), folder / "out"
    (out / "train").mkdir(parents=True)
    (out / PLAN_FILE).write_text("{}")
    plan = plan_images(source, ImageOptions(shard_size=10))
    return jobs_of(plan, source, out, load_image)[0]


def test_a_different_node_is_named_with_what_it_lacks(tmp_path):
    job = one_job(tmp_path)
    witness = job.root / job.samples[0].source
    with pytest.raises(UserError, match=r"does not see .*/source/gone; mount source and --out"):
        pack_on_node(job, job.root / "gone")
    with pytest.raises(
        UserError, match=r"has pillow [0-9.]+, not 1\.0, which may write other bytes; .*lock on all nodes\.$"
    ):
        pack_on_node(replace(job, packing=replace(job.packing, pillow="1.0")), witness)
    assert not list(job.folder.iterdir()), "a wrong node writes nothing"
    with pytest.raises(UserError, match=r"train/000000 was packed on another node, not seen here"):
        wait_until_seen([job], 0)
    assert pack_on_node(job, witness)[:2] == (3, 0)
    wait_until_seen([job], 0)
    (job.folder.parent / PLAN_FILE).unlink()
    with pytest.raises(UserError, match=r"does not see .*/out/\.plan\.json"):
        pack_on_node(job, witness)


def test_missing_ray_or_cluster_ends_with_one_line(tmp_path, monkeypatch):
    source = image_tree(tmp_path / "source", train=1, val=1)
    pack = partial(pack_images, source, tmp_path / "out")
    with pytest.raises(UserError, match=r"--ray host:1 needs --executor ray \(EXECUTOR=ray\)"):
        pack(ray="host:1")
    if find_spec("ray"):
        for address in ("localhost:9", "nonsense", "auto"):
            with pytest.raises(UserError, match=rf"no Ray cluster can be joined at --ray {address} \("):
                pack(executor="ray", ray=address)
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python marks what cannot be imported
    with pytest.raises(UserError, match=r"needs Ray, which is not installed; run make env-ray\.$"):
        pack_images(source, tmp_path / "none", executor="ray")
    assert not (tmp_path / "none").exists(), "a wrong use leaves nothing behind"


def test_the_lock_of_ray_agrees_with_the_main_lock():
    text = (ROOT / "requirements-ray.lock").read_text()
    assert "://" not in text and "index-url" not in text and "--hash=sha256:" in text
    base = {pin.name: str(pin.specifier) for pin in requirements("requirements.lock")}
    pins = {pin.name: str(pin.specifier) for pin in requirements("requirements-ray.lock")}
    assert "ray" in pins and "ray" not in base
    assert all(base.get(name, pin) == pin for name, pin in pins.items())


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make env-ray")
def test_on_ray_a_dying_node_does_not_change_the_bytes(tmp_path):
    from ray.cluster_utils import Cluster

    source = image_tree(tmp_path / "source", train=40, val=10, size=(500, 400))
    (source / "train/n01/bad.JPEG").write_bytes(b"")
    local, out = tmp_path / "local", tmp_path / "ray"
    assert pack_images(source, local, shard_size=2) == 0
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    try:
        other = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        words = ["--executor", "ray", "--ray", cluster.address]
        driver = start(source, out, *words)
        wait_for(lambda: len(list(out.glob("*/*.parquet"))) > 5)
        driver.send_signal(2)  # Ctrl-C: what is done stays
        assert driver.wait(60) == 130
        done = [path.with_suffix(".tar") for path in out.glob("*/*.parquet")]
        kept = {path: path.stat().st_mtime_ns for path in done}
        driver = start(source, out, *words)
        wait_for(lambda: len(list(out.glob("*/*.parquet"))) > len(kept) + 5)
        cluster.remove_node(other, allow_graceful=False)
        said, errors = driver.communicate(timeout=180)
        assert driver.returncode == 0, errors
        assert "rejected: empty file" in said
        assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*/*.tar")}.items()
        assert sums(out) == sums(local)
    finally:
        cluster.shutdown()
