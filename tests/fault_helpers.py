"""Training with a fault: processes killed at chosen moments, and `python -m tests.fault_helpers PRESET ...`,
which is train.mae with the fault $FAULT in its last process at steps 5 and 6."""

import itertools
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from torch import nn

from pipelines.errors import run_cli
from pipelines.loader import Batch
from train import checkpoint, finetune, loop, mae, rundir
from train.config import Config, MaeConfig
from train.console import parse
from train.metrics import MetricsWriter
from train.presets import MAE_PRESETS
from train.rundir import Run
from train.task import MakeTask, Task

CLEAN = multiprocessing.get_context("forkserver")  # its children start with everything imported
PRELOADED = (
    "tests.fault_helpers",
    "tools.pack",
    "models",
    "timm.optim",
    "timm.utils",
)
CLEAN.set_forkserver_preload(list(PRELOADED))
MOMENTS = ("between", "evaluation", "checkpoint", "metric row", "Parquet part")


def train(config: Config, log: Path, moment: Synchronized) -> None:
    """The main function of a training process; `moment` is the current index in MOMENTS."""
    redirect_output(log)

    def marked(number: int, function: Callable) -> Callable:
        def wrapped(*arguments, **named):
            moment.value = number
            try:
                return function(*arguments, **named)
            finally:
                moment.value = 0

        return wrapped

    def make_task(*arguments) -> Task:
        task = make(*arguments)
        return replace(task, evaluate=marked(1, task.evaluate))

    make = task_of(config)
    checkpoint.save = marked(2, checkpoint.save)
    MetricsWriter.write = marked(3, MetricsWriter.write)
    MetricsWriter.commit = marked(4, MetricsWriter.commit)
    run_cli(lambda: loop.main(config, make_task))


def redirect_output(log: Path) -> None:
    """Redirect the output of this process to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def task_of(configuration: Config) -> MakeTask:
    return mae.make_task if isinstance(configuration, MaeConfig) else finetune.make_task


def two_ranks(*settings: Config) -> tuple[list[int | None], str]:
    """Train in one process per configuration; returns their exit codes and output."""
    log, port = settings[0].run.root / "ranks.out", free_port()
    processes = [CLEAN.Process(target=be_rank, args=(r, port, one, log)) for r, one in enumerate(settings)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes], log.read_text()


def be_rank(rank: int, port: int, settings: Config, log: Path) -> None:
    redirect_output(log)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, 2, 2, "127.0.0.1", port)), strict=True))
    run_cli(lambda: loop.main(settings, task_of(settings)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_until_done(config: Config, kills: int, seed: int) -> Counter[str]:
    """Run to the end while the process is killed `kills` times; returns the moments of the kills.

    SIGKILL and SIGTERM alternate, and so do the moments. Fails if a process ends in any other way.
    """
    rng, hits = random.Random(seed), Counter()
    log = config.run.root / f"{config.run.name}.out"
    aims = itertools.cycle(range(len(MOMENTS)))
    while not rundir.is_finished(config):
        moment = CLEAN.Value("i", 0)
        process = CLEAN.Process(target=train, args=(config, log, moment))
        process.start()
        if hits.total() < kills:
            aim, until = next(aims), time.monotonic() + rng.uniform(1.0, 4.0)
            while process.is_alive() and (time.monotonic() < until or moment.value != aim):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
            if process.is_alive():
                hits[MOMENTS[moment.value]] += 1
                os.kill(process.pid or 0, (signal.SIGKILL, signal.SIGTERM)[hits.total() % 2])
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), (
            log.read_text()
        )
    return hits


def make_faulty_task(config: MaeConfig, run: Run) -> Task:
    """Pretraining with a fault in the last process at steps 5 and 6; if $FAULT ends in +, also later."""
    task, world = mae.make_task(config, run), run.world
    fault, calls = os.environ["FAULT"], itertools.count(1)
    bad = False

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal bad
        call = next(calls)
        bad = world.rank == world.size - 1 and (call in (5, 6) or (call > 6 and fault.endswith("+")))
        value = task.loss(model, batch)
        if bad and fault.startswith("loss"):
            return value * float("inf")
        if bad and fault == "memory":
            torch.empty(1 << 50)
        if bad and fault == "error":
            raise AssertionError("a mistake in the code")
        return value

    def spoil_input(module: nn.Module, inputs: tuple) -> tuple | None:
        spoils = bad and fault == "input" and module.training
        return (inputs[0] * float("nan"), *inputs[1:]) if spoils else None

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient * float("nan") if bad and fault == "gradient" else None

    task.model.register_forward_pre_hook(spoil_input)
    next(task.model.parameters()).register_hook(spoil_gradient)
    return replace(task, loss=loss)


if __name__ == "__main__":
    print("fault:", os.environ["FAULT"], file=sys.stderr)
    run_cli(lambda: loop.main(parse(MAE_PRESETS, "tests.fault_helpers"), make_faulty_task))
