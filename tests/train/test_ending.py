"""If one process fails, the others end too."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipelines.errors import UserError, run_cli
from tests.fault_helpers import CLEAN, free_port, redirect_output
from tests.train.test_resume import quick
from train import finetune, loop
from train.config import Config
from train.ending import Watch
from train.task import Task

GONE = UserError("the disk is gone; find it")
ERRORS = {"user": GONE, "both": GONE, "code": AssertionError("a mistake in the code")}


def train_and_fail(rank: int, port: int, settings: Config, kind: str, log: Path) -> None:
    """Rank 1, or both, fail in the third step; else rank 0 waits there, as for a lost NCCL kernel."""
    redirect_output(log)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, 2, 2, "127.0.0.1", port)), strict=True))
    # NCCL's process group also waits while one of its kernels waits for another process.
    dist.destroy_process_group = hang

    def make(*given) -> Task:
        task, calls = finetune.make_task(*given), iter(range(1, 1000))

        def loss(*batch) -> torch.Tensor:
            if next(calls) == 3:
                if rank == 1 or kind == "both":
                    raise ERRORS[kind]
                hang()
            return task.loss(*batch)

        return replace(task, loss=loss)

    run_cli(lambda: loop.main(settings, make))


def hang() -> None:
    while True:
        time.sleep(600)


def run_both(body: Callable, *given: object) -> tuple[list[int | None], float]:
    """Run `body` as rank 0 and 1; returns exit codes (None after two minutes) and seconds."""
    port, begin = free_port(), time.monotonic()
    processes = [CLEAN.Process(target=body, args=(rank, port, *given)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, begin + 120 - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, time.monotonic() - begin


@pytest.mark.parametrize(("kind", "code"), [("user", 2), ("code", 1)])
def test_a_failing_process_prints_its_error_and_ends_the_others(images, tmp_path, kind, code):
    settings = quick(images, tmp_path, "run")
    settings = replace(settings, speed=replace(settings.speed, micro_batch=2))
    codes, seconds = run_both(train_and_fail, settings, kind, tmp_path / "out")
    printed = (tmp_path / "out").read_text()
    assert codes == [2, code], (seconds, printed)
    assert printed.count(str(ERRORS[kind])) == 1 and printed.count("process 0: another process failed") == 1
    assert ("Traceback" in printed) == (kind == "code")
    assert f"[rank 1] {'error' if kind == 'user' else 'AssertionError'}: {ERRORS[kind]}\n" in printed
    logged = (tmp_path / "run/logs/rank-1.txt").read_text()
    assert "CPU cores per process: " in logged and str(ERRORS[kind]) in logged and "[rank" not in logged
    assert ("Traceback" in logged) == (kind == "code")


def test_processes_with_the_same_error_print_it_once(images, tmp_path):
    settings = quick(images, tmp_path, "run")
    settings = replace(settings, speed=replace(settings.speed, micro_batch=2))
    codes, seconds = run_both(train_and_fail, settings, "both", tmp_path / "out")
    printed = (tmp_path / "out").read_text()
    assert codes == [2, 2], (seconds, printed)
    assert printed.count(str(GONE)) == 1 and "another process failed" not in printed


def test_an_error_that_is_not_utf_8_is_reported_and_compared():
    store = dist.HashStore()
    first, equal, other = (Watch(rank, store) for rank in range(3))
    assert not first.report("no file b\udce4r")
    assert equal.report("no file b\udce4r") and not other.report("no file b\udcf6r")
