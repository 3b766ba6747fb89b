"""Reliability of runs: `make faults` prints these tests as a table, with many more kills."""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.config import Augment
from pipelines.errors import UserError
from tests.fault_helpers import CLEAN, kill_until_done, redirect_output
from tests.train.test_runs import assert_same, descendants, fit, results
from tests.train_helpers import ROOT, arguments, call, module, small
from tools.pack import ClipOptions, ImageOptions, pack_clips, pack_images
from train import finetune, mae
from train.config import Config, FinetuneConfig
from train.metrics import read_csv

pytestmark = pytest.mark.fault
long = pytest.mark.long
Happened = Callable[[str], None]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small disk at `folder`; skips the test if mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def named(config: Config, name: str, **run: object) -> Config:
    return replace(config, run=replace(config.run, name=name, **run))


def pretraining(images: Path, root: Path, name: str, processes: int = 1, **optim: object) -> Config:
    config = small("image-mae-pico", images, root, name, **optim)
    return replace(config, speed=replace(config.speed, processes=processes, timeout=5.0))


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests use copies of it."""
    config = pretraining(images, tmp_path_factory.mktemp("one"), "run")
    return fit(config, mae.make_task)


# ---- killed at any moment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["image-ft-pico", pytest.param("video-mae-pico", marks=long)])
def test_training_is_killed_at_any_moment(
    preset: str, images: Path, clips: Path, tmp_path: Path, pytestconfig, happened: Happened
):
    """only steps after the last checkpoint are lost; the results equal an uninterrupted run bit for bit"""
    config = small(preset, clips if "video" in preset else images, tmp_path, "whole", epochs=6.0, ema=0.9)
    config = replace(config, data=replace(config.data, augment=Augment(layers=2, erase=0.25)))
    config = named(config, "whole", log_every=1, eval_every=3, checkpoint_every=2)
    if isinstance(config, FinetuneConfig):
        config = replace(config, mixup=0.8, cutmix=1.0)
    fit(config, mae.make_task if "mae" in preset else finetune.make_task)
    kills, hits, runs = pytestconfig.getoption("kills"), Counter(), 0
    while hits.total() < kills:
        killed = named(config, f"killed-{runs}")
        hits += kill_until_done(killed, min(kills - hits.total(), 20), seed=runs)
        assert_same(tmp_path / "whole", tmp_path / killed.run.name)
        runs += 1
    moments = ", ".join(f"{count} {moment}" for moment, count in hits.items())
    happened(f"{hits.total()} kills ({moments}), {runs} runs, all bit-equal")


def pack(kind: str, source: Path, out: Path, log: Path) -> None:
    redirect_output(log)
    if kind == "image":
        pack_images(source, out, ImageOptions(workers=2, shard_size=8))
    else:
        options = ClipOptions(workers=2, shard_size=2)
        pack_clips(source / "annotations", out, options, frames=source / "frames")


@long
@pytest.mark.parametrize("kind", ["video", "image"])
def test_packing_is_killed_at_any_moment(
    kind: str, images: Path, clips: Path, tmp_path: Path, pytestconfig, happened: Happened
):
    """finished shards are kept; the files equal uninterrupted packing byte for byte"""
    source = images.parent / "source" if kind == "image" else clips.parent
    log, kills, runs = tmp_path / "out", 0, 0
    run_packing(kind, source, tmp_path / "whole", log)
    begin = time.monotonic()
    run_packing(kind, source, tmp_path / "again", log)  # the first one also imported modules
    seconds, rng = time.monotonic() - begin, np.random.default_rng(0)
    while kills < pytestconfig.getoption("kills"):
        out, patience = tmp_path / f"killed-{runs}", seconds
        while not (out / "dataset.json").exists():
            kills += run_packing(kind, source, out, log, rng.uniform(0, patience))
            patience *= 1.1  # on a busy machine it takes longer than the first time
        run_packing(kind, source, out, log)
        assert trees(out) == trees(tmp_path / "whole")
        runs += 1
    happened(f"{kills} kills, {runs} packings, all byte-equal")


def run_packing(kind: str, source: Path, out: Path, log: Path, patience: float = 60.0) -> int:
    """Pack in a new process; returns 1 if it was killed after `patience` seconds, else 0."""
    process = CLEAN.Process(target=pack, args=(kind, source, out, log))
    process.start()
    process.join(patience)
    alive = process.exitcode is None
    process.kill()
    process.join()
    assert alive or process.exitcode == 0, log.read_text()
    return int(alive)


def trees(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ---- processes that die, hang, or compute wrong values -----------------------------------------------------


def start(
    config: Config, program: str = "train.mae", log: Path | None = None, **environment: str
) -> subprocess.Popen:
    output = (log or config.run.root / f"{config.run.name}.out").open("w")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = module(program, "image-mae-pico", *arguments(config))
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)


def wait_for_row(config: Config, step: int) -> None:
    path = config.run.root / config.run.name / "metrics.csv"
    deadline = time.monotonic() + 90
    while not (path.exists() and any(row["step"] >= step for row in read_csv(path))):
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def of_rank(parent: int, rank: int) -> int:
    for pid in descendants(parent):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of two processes."""
    config = pretraining(images, tmp_path_factory.mktemp("two"), "whole", 2, epochs=5.0)
    config = named(config, "whole", log_every=1)
    assert start(config).wait(120) == 0
    return config


@long
@pytest.mark.parametrize(
    ("number", "limit"), [(signal.SIGKILL, 30), pytest.param(signal.SIGSTOP, 75, marks=long)]
)
def test_a_process_is_killed_or_stopped(
    number: signal.Signals, limit: int, undisturbed: Config, tmp_path: Path, happened: Happened
):
    """the others exit within a minute (stopped: after speed.timeout) with one line; the run resumes"""
    config = named(undisturbed, "run", root=tmp_path)
    process = start(config)
    wait_for_row(config, 6)
    begin = time.monotonic()
    os.kill(of_rank(process.pid, 1), number)
    assert process.wait(limit) != 0
    seconds = time.monotonic() - begin
    printed = (tmp_path / "run.out").read_text()
    assert (
        printed.count("another process ended, or did not answer for 5 s") == 1 and "Traceback" not in printed
    )
    assert start(config).wait(120) == 0
    assert "resumed from step" in (tmp_path / "run" / "log.txt").read_text()
    assert_same(tmp_path / "run", undisturbed.run.root / "whole")
    happened(f"ended after {seconds:.0f} s, resumed, bit-equal")


@long
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=long)])
def test_a_process_is_killed_and_restarts_are_allowed(
    rank: int, undisturbed: Config, tmp_path: Path, happened: Happened
):
    """with speed.restarts the same command resumes by itself, bit for bit"""
    config = named(undisturbed, "run", root=tmp_path)
    config = replace(config, speed=replace(config.speed, restarts=1))
    process = start(config)
    wait_for_row(config, 6)
    os.kill(of_rank(process.pid, rank), signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "run.out").read_text()
    assert_same(tmp_path / "run", undisturbed.run.root / "whole")
    resumed = [x for x in (tmp_path / "run/log.txt").read_text().split("\n") if "resumed" in x]
    assert len(resumed) == 1
    happened(f"{resumed[0]}, bit-equal")


@long
def test_code_fails_in_one_process(images: Path, tmp_path: Path, happened: Happened):
    """all exit within a minute; the traceback is printed once"""
    config = pretraining(images, tmp_path, "run", 2, epochs=9.0)
    begin = time.monotonic()
    assert start(config, "tests.fault_helpers", FAULT="error").wait(90) != 0
    seconds = time.monotonic() - begin
    printed = (tmp_path / "run.out").read_text()
    assert printed.count("Traceback") == printed.count("AssertionError: a mistake in the code") == 1, printed
    assert seconds < 60
    happened(f"over {seconds:.0f} s after the start")


@pytest.mark.parametrize("fault", [pytest.param(part, marks=long) for part in ("input", "loss", "gradient")])
def test_one_process_computes_non_finite_values(fault: str, images: Path, tmp_path: Path, happened: Happened):
    """all processes skip and count the step; the weights stay finite"""
    config = named(pretraining(images, tmp_path, "run", 2, batch=6), "run", log_every=1, detail=True)
    assert start(config, "tests.fault_helpers", FAULT=fault).wait(120) == 0, (
        tmp_path / "run.out"
    ).read_text()
    weights, rows = results(tmp_path / "run")
    assert all(value.isfinite().all() for value in weights.values())
    assert {row["step"]: row["skipped"] for row in rows}[6] == rows[-1]["skipped"] == 2
    happened("2 steps skipped, then training continued")


@long
def test_non_finite_values_persist(images: Path, tmp_path: Path):
    """after run.max_skipped steps in a row the run stops and names the last good checkpoint"""
    config = named(pretraining(images, tmp_path, "run", 2, batch=6, epochs=9.0), "run", max_skipped=4)
    assert start(config, "tests.fault_helpers", FAULT="loss+").wait(120) == 2
    printed = (tmp_path / "run.out").read_text()
    assert "had non-finite gradients" in printed and "Traceback" not in printed


@long
def test_memory_runs_out_in_a_step(images: Path, tmp_path: Path):
    """one line names the setting to lower"""
    config = pretraining(images, tmp_path, "run")
    assert start(config, "tests.fault_helpers", FAULT="memory").wait(120) == 2
    printed = (tmp_path / "run.out").read_text()
    assert "lower speed.micro_batch (6)" in printed and "Traceback" not in printed


# ---- disks and files ---------------------------------------------------------------------------------------


def test_the_disk_is_full_while_packing(images: Path, tmp_path: Path, happened: Happened):
    """one line; with more space the same command gives the files of uninterrupted packing, byte for byte"""
    source, rest = images.parent / "source", ["--workers", "1", "--shard-size", "8"]
    words = ["images", "--source", str(source), "--out"]
    assert call("tools.pack", *words, str(tmp_path / "whole"), *rest).returncode == 0
    with small_disk(tmp_path / "disk", "100k") as disk:
        failed = call("tools.pack", *words, str(disk / "out"), *rest)
        assert failed.returncode == 2 and "the disk is full" in failed.stderr and "Trace" not in failed.stderr
        finished = len(list((disk / "out").rglob("*.tar")))
        remount(disk, "size=10m")
        assert call("tools.pack", *words, str(disk / "out"), *rest).returncode == 0
        assert trees(disk / "out") == trees(tmp_path / "whole")
    happened(f"{finished} shards were kept, byte-equal in the end")


@long
@pytest.mark.parametrize("free", ["checkpoints", pytest.param("rows", marks=long)])
def test_the_disk_is_full_while_training(free: str, images: Path, tmp_path: Path, happened: Happened):
    """one line; with more space the same command gives the results of an uninterrupted run, bit for bit"""
    whole = named(pretraining(images, tmp_path, "whole", epochs=9.0), "whole", log_every=1)
    fit(whole, mae.make_task)
    with small_disk(tmp_path / "disk", "140m" if free == "checkpoints" else "400m") as disk:
        config = named(whole, "whole", root=disk)
        process = start(config, log=tmp_path / "log")
        if free == "rows":
            wait_for_row(config, 9)
            with pytest.raises(OSError, match="No space left"):
                (disk / "filler").write_bytes(bytes(1 << 29))
        assert process.wait(120) == 2, (tmp_path / "log").read_text()
        printed = (tmp_path / "log").read_text()
        assert "Traceback" not in printed and printed.count("error:") == 1 and "free some space" in printed
        reached = max((disk / "whole/checkpoints").glob("*.pt")).stem
        (disk / "filler").unlink(missing_ok=True)
        remount(disk, "size=400m")
        assert start(config, log=tmp_path / "log").wait(120) == 0
        assert_same(tmp_path / "whole", disk / "whole")
    happened(f"stopped after {reached}, then bit-equal")


def test_the_folder_cannot_be_written(finished: Path, images: Path, tmp_path: Path):
    """one line and no loss: the run resumes once the folder can be written again"""
    with small_disk(tmp_path / "disk", "400m") as disk:
        config = pretraining(images, disk, "run")
        shutil.copytree(finished, disk / "run")
        (disk / "run" / "model.safetensors").unlink()
        before = trees(disk)
        remount(disk, "ro")
        refused = call("train.mae", "image-mae-pico", *arguments(config))
        assert refused.returncode == 2 and "cannot be written" in refused.stderr
        assert refused.stderr.count("\n") == 1 and trees(disk) == before
        remount(disk, "rw")
        fit(config, mae.make_task)
        assert "resumed from step" in (disk / "run" / "log.txt").read_text()


@pytest.mark.parametrize("damage", ["cut off", "a bit flipped", "empty", "all damaged"])
def test_checkpoints_are_damaged(
    damage: str, finished: Path, images: Path, tmp_path: Path, happened: Happened
):
    """the newest valid one is used, with a warning; if none is valid, the run ends and changes nothing"""
    config = pretraining(images, tmp_path, "run")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    paths = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    for path in paths if damage == "all damaged" else paths[-1:]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        whole = {"cut off": data[: len(data) // 2], "empty": b""}.get(damage, data)
        path.write_bytes(whole)
    if damage == "all damaged":
        with pytest.raises(UserError, match="none of the checkpoints"):
            fit(config, mae.make_task)
        happened("ended with one line")
        return
    fit(config, mae.make_task)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{paths[-1]} is damaged" in log and "resumed from step" in log
    assert_same(tmp_path / "run", finished)
    happened("warned; results bit-equal")


@pytest.mark.parametrize("damage", ["part cut off", "part gone", "row cut off", "row garbled", "CSV gone"])
def test_metrics_are_damaged(damage: str, finished: Path, images: Path, tmp_path: Path):
    """readable rows are kept; the last one is in the checkpoint; CSV and Parquet are equal"""
    config = pretraining(images, tmp_path, "run")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "model.safetensors").unlink()
    csv, part = run / "metrics.csv", max((run / "metrics").glob("*.parquet"))
    rows = read_csv(csv)
    if damage == "part cut off":
        part.write_bytes(part.read_bytes()[:100])
    elif damage == "part gone":
        part.unlink()
    elif damage == "row cut off":
        csv.write_bytes(csv.read_bytes()[:-9])
    elif damage == "row garbled":
        csv.write_bytes(csv.read_bytes().replace(b"\n", b"\n\0\xff,,;x\n", 2))
    else:
        csv.unlink()
    fit(config, mae.make_task)
    found = read_csv(csv)
    assert found == pq.read_table(run / "metrics").to_pylist()
    assert found == (rows[-1:] if damage == "CSV gone" else rows)


@long
@long
def test_two_runs_use_one_folder(images: Path, tmp_path: Path):
    """the second is refused; the first continues"""
    config = pretraining(images, tmp_path, "run", epochs=30.0)
    first = start(config)
    wait_for_row(config, 3)
    second = call("train.mae", "image-mae-pico", *arguments(config))
    assert second.returncode == 2 and "another process is training" in second.stderr
    first.terminate()
    assert first.wait(60) == 143


def test_the_clock_is_set_back(finished: Path, images: Path, tmp_path: Path):
    """checkpoints are ordered by step, not by date"""
    config = pretraining(images, tmp_path, "run")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "model.safetensors").unlink()
    newest = max((run / "checkpoints").glob("*.pt"))
    for path in run.rglob("*"):
        os.utime(path, (1, 1) if path == newest else (5e9, 5e9))
    fit(config, mae.make_task)
    assert f"resumed from step {int(newest.stem.split('-')[1])}" in (run / "log.txt").read_text()
    assert_same(run, finished)


@long
def test_a_run_is_copied_elsewhere_and_resumed(images: Path, tmp_path: Path):
    """the copy resumes from the last step, bit for bit"""
    config = pretraining(images, tmp_path, "whole", epochs=6.0)
    fit(config, mae.make_task)
    process = start(named(config, "first"))
    wait_for_row(named(config, "first"), 6)
    process.kill()
    process.wait()
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "first", tmp_path / "elsewhere" / "second")
    shutil.rmtree(tmp_path / "first")
    copied = named(config, "second", root=tmp_path / "elsewhere")
    fit(copied, mae.make_task)
    assert "resumed from step" in (tmp_path / "elsewhere/second/log.txt").read_text()
    assert_same(tmp_path / "elsewhere" / "second", tmp_path / "whole")
