"""Complete runs in processes that start with everything imported.

A start is the real command: `main` with its arguments in sys.argv, real DALI, a real process group. Only the
model is smaller. Several processes are started as torchrun starts them. A start can get a signal at a chosen
moment: at a forward pass, or when it accesses a file of its run folder.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipelines.errors import run_cli
from tests.fault_helpers import CLEAN, PRELOADED

# Modules that a run imports late; the fork server imports them only once.
LATE = ("tyro", "tyro._backends._tyro_backend", "typeguard", "dateutil.relativedelta", "pyarrow.dataset")
LATE += ("timm.scheduler", "models.zoo", "torch.utils.flop_counter", "nvidia.dali._debug_mode", "numpy.ma")
OURS = ("tests.run_machine", "train.card", "train.evaluate", "train.finetune", "train.mae")
CLEAN.set_forkserver_preload([*PRELOADED, *LATE, *OURS])

PATIENCE = 120.0  # maximum seconds of a start
GRACE = 60.0  # seconds in which the other processes must end after one has failed
FILE_EVENTS = ("open", "os.rename", "os.remove")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Moment:
    """A signal for a start: at the `count`-th such event of each of the processes `ranks`."""

    signal: str
    event: str
    """train or evaluate: a forward pass. file TEXT: a file of the run with TEXT in its path is opened,
    renamed or removed."""
    count: int
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Job:
    """A command: its arguments, its run folder, and the folder for its output."""

    program: str
    words: tuple[str, ...]
    run: Path
    out: Path
    processes: int = 1
    moment: Moment | None = None
    port: int = 0
    slow: str = ""
    """Opening a file of the run with this text in its path takes a second, as on a slow disk."""


@dataclass
class Ended:
    """The result of a start. `train` and `evaluate` count forward passes until the end or the signal."""

    codes: list[int]
    stdout: str
    stderr: str
    struck: bool
    train: int
    evaluate: int
    groups: list[list[dict]]
    """The hyperparameters of the optimizer's groups at each optimizer step, up to the signal."""
    seconds: float

    @property
    def code(self) -> int:
        """The exit code of torchrun, which ends the other processes by SIGTERM, the highest number here."""
        failures = [code for code in self.codes if code < 0]
        return next((code for code in self.codes if code > 0), max(failures, default=0))

    def __str__(self) -> str:
        struck = f", struck at forward {self.train} + {self.evaluate}" if self.struck else ""
        output = f"--- stdout\n{self.stdout}--- stderr\n{self.stderr}"
        return f"codes {self.codes}{struck}, {self.seconds:.1f} s\n{output}"


# ---- in the started process --------------------------------------------------------------------------------


class Watch:
    """Counts the events of this process, sends the signal at its moment, and writes the counts to a file."""

    def __init__(self, job: Job, rank: int) -> None:
        self.moment = job.moment if job.moment and rank in job.moment.ranks else None
        self.run, self.note = str(job.run), job.out / f"note-{rank}.json"
        self.slow = job.slow
        self.seen, self.struck = Counter(), False
        self.groups: list[list[dict]] = []
        register_optimizer_step_pre_hook(self._step)
        nn.modules.module.register_module_forward_pre_hook(self._forward)
        sys.addaudithook(self._audit)

    def write(self) -> None:
        """Write the counts, unless they were written at the signal."""
        counts = {"struck": self.struck, "train": self.seen["train"], "evaluate": self.seen["evaluate"]}
        counts["groups"] = self.groups
        if not self.note.exists():
            self.note.write_text(json.dumps(counts))

    def _step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):  # fits the probe of an evaluation
            return
        groups = optimizer.param_groups
        self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in groups])

    def _forward(self, module: nn.Module, _: object) -> None:
        if type(module).__name__ == "NormalizedInput":
            self._happened("train" if module.training else "evaluate")

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            if isinstance(path, str) and path.startswith(self.run):
                if self.slow and event == "open" and self.slow in path:
                    time.sleep(1)
                self._happened(f"file {path[len(self.run) :]}")

    def _happened(self, what: str) -> None:
        moment = self.moment
        self.seen[what] += 1
        if moment is None or self.struck:
            return
        kind, _, text = moment.event.partition(" ")
        if what.partition(" ")[0] == kind and text in what:
            self.seen["aim"] += 1
            if self.seen["aim"] == moment.count:
                self.struck = True
                self.write()
                if moment.event == "evaluate":
                    _let_the_writer_finish()
                os.kill(os.getpid(), signal.Signals[moment.signal])


def _let_the_writer_finish() -> None:
    """Wait until the thread that writes checkpoints is idle: all checkpoints are then on the disk."""
    time.sleep(0.2)
    for thread in threading.enumerate():
        while thread.name.startswith("checkpoint") and _function_of(thread) != "_worker":
            time.sleep(0.001)


def _function_of(thread: threading.Thread) -> str:
    """The function that a thread is executing."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame.f_code.co_name if frame else "_worker"


def work(job: Job, rank: int) -> None:
    """The main function of a process: the real command with a smaller model."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job.out / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    importlib.import_module("faulthandler").dump_traceback_later(PATIENCE - 5)
    shrink_models()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # torch uses one thread on every machine
    if job.processes > 1:
        os.environ.update(torchrun_environment(job, rank))
    watch = Watch(job, rank)
    sys.argv = [job.program, *job.words]
    try:
        run_cli(importlib.import_module(job.program).main)
    finally:
        watch.write()
        sys.stdout.flush()


def shrink_models() -> None:
    """Make the pico models even smaller: a tenth of a million parameters."""
    from models import zoo

    small = {"width": 8, "stages": (1, 1, 1, 1), "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    for name in ("hiera_pico_96", "hiera_pico_16x64"):
        zoo.CONFIGS[name] = replace(zoo.CONFIGS[name], **small)


def torchrun_environment(job: Job, rank: int) -> dict[str, str]:
    """The environment variables that torchrun sets for a worker."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": job.port}
    numbers |= {
        "WORLD_SIZE": job.processes,
        "LOCAL_WORLD_SIZE": job.processes,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    words = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return words | {key: str(value) for key, value in numbers.items()}


# ---- in the test -------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Start the fork server; its imports take seconds, on a busy machine a minute."""
    process = CLEAN.Process(target=shrink_models)
    process.start()
    process.join(300)
    assert process.exitcode == 0, "the fork server does not work"


def launch(job: Job) -> Ended:
    """Run a command until all its processes have ended; if one fails, the others are terminated."""
    begin = time.monotonic()
    shutil.rmtree(job.out, ignore_errors=True)
    job.out.mkdir(parents=True)
    store = None
    if job.processes > 1:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = replace(job, port=store.port)
    workers = [CLEAN.Process(target=work, args=(job, rank)) for rank in range(job.processes)]
    late = ""
    try:
        for worker in workers:
            worker.start()
        late = _supervise(job, workers, begin + PATIENCE)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
        del store
    ended = _ended(job, [worker.exitcode or 0 for worker in workers], time.monotonic() - begin)
    assert not late, f"{late}: {ended}"
    return ended


def _supervise(job: Job, workers: list, deadline: float) -> str:
    """Wait as torchrun does: after the first failure, the others get SIGTERM. Returns a problem, or ""."""
    passed_on = False
    while alive := [worker for worker in workers if worker.exitcode is None]:
        wait([worker.sentinel for worker in alive], max(0.0, deadline - time.monotonic()))
        if time.monotonic() >= deadline:
            return "a process did not end in time"
        codes = [worker.exitcode for worker in workers]
        if not passed_on and any(codes):
            passed_on = True
            all_die = job.moment and job.moment.signal == "SIGKILL" and len(job.moment.ranks) == len(workers)
            for worker in workers:
                if worker.exitcode is None:
                    worker.kill() if all_die and -signal.SIGKILL in codes else worker.terminate()
            deadline = min(deadline, time.monotonic() + GRACE)
    return ""


def _ended(job: Job, codes: list[int], seconds: float) -> Ended:
    notes = [json.loads(path.read_text()) for path in sorted(job.out.glob("note-*.json"))]
    struck = any(note["struck"] for note in notes)
    counted = [note for note in notes if note["struck"] == struck]  # the other processes continued a little
    stdout, stderr = (
        "".join(path.read_text() for path in sorted(job.out.glob(f"{name}-*")))
        for name in ("stdout", "stderr")
    )
    train, evaluate = (max((n[key] for n in counted), default=0) for key in ("train", "evaluate"))
    groups = max((note["groups"] for note in counted), key=len, default=[])
    return Ended(codes, stdout, stderr, struck, train, evaluate, groups, seconds)
