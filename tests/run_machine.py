"""Whole runs in processes that begin with everything imported, and runs to compare them with.

A start here is the real command: `main` with its words in sys.argv, DALI and the process group as they are.
Only the model is smaller. Several processes are started as torchrun does it. A start can be struck by a
signal at a chosen moment: at a forward pass, or when it touches a file of its run folder.
"""

import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.catalogue import open_catalogue
from pipelines.errors import run_cli
from tests.fault_helpers import CLEAN, PRELOADED
from train.metrics import read_csv

# What a run imports late: in the server it costs nothing.
LATE = ("tyro", "tyro._backends._tyro_backend", "typeguard", "dateutil.relativedelta", "pyarrow.dataset")
LATE += ("timm.scheduler", "models.macs", "torch.utils.flop_counter", "nvidia.dali._debug_mode", "numpy.ma")
OURS = ("tests.run_machine", "train.card", "train.evaluate", "train.finetune", "train.mae", "train.pictures")
CLEAN.set_forkserver_preload([*PRELOADED, *LATE, *OURS])

PATIENCE = 60.0  # seconds that a start may take
GRACE = 20.0  # seconds that the other processes have to end once one has failed
FILE_EVENTS = ("open", "os.rename", "os.remove")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Moment:
    """When a start is struck, and by what: at the `count`-th such event of each of the processes `ranks`."""

    signal: str
    event: str
    """train or evaluate: a forward pass; file TEXT: a file of the run with TEXT in its path is opened,
    renamed or removed."""
    count: int
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Job:
    """A command: its words, its run folder, and where its output goes."""

    program: str
    words: tuple[str, ...]
    run: Path
    out: Path
    processes: int = 1
    moment: Moment | None = None
    port: int = 0


@dataclass
class Ended:
    """How a start ended. `train` and `evaluate` count forward passes, up to the signal where one struck."""

    codes: list[int]
    stdout: str
    stderr: str
    struck: bool
    train: int
    evaluate: int
    seconds: float

    @property
    def code(self) -> int:
        """The command's exit code, as torchrun would give it."""
        return next((code for code in self.codes if code > 0), min(self.codes))

    def __str__(self) -> str:
        struck = f", struck at forward {self.train} + {self.evaluate}" if self.struck else ""
        said = f"--- stdout\n{self.stdout}--- stderr\n{self.stderr}"
        return f"codes {self.codes}{struck}, {self.seconds:.1f} s\n{said}"


# ---- in the process that is started ------------------------------------------------------------------------


class Watch:
    """Counts what this process does, strikes it at its moment, and leaves the counts in a file."""

    def __init__(self, job: Job, rank: int) -> None:
        self.moment = job.moment if job.moment and rank in job.moment.ranks else None
        self.run, self.note = str(job.run), job.out / f"note-{rank}.json"
        self.seen, self.struck = Counter(), False
        nn.modules.module.register_module_forward_pre_hook(self._forward)
        sys.addaudithook(self._audit)

    def write(self) -> None:
        """Leave the counts; those of the moment stay."""
        counts = {"struck": self.struck, "train": self.seen["train"], "evaluate": self.seen["evaluate"]}
        if not self.note.exists():
            self.note.write_text(json.dumps(counts))

    def _forward(self, module: nn.Module, _: object) -> None:
        if type(module).__name__ == "Normalised":
            self._happened("train" if module.training else "evaluate")

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            if isinstance(path, str) and path.startswith(self.run):
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
                os.kill(os.getpid(), signal.Signals[moment.signal])


def work(job: Job, rank: int) -> None:
    """The body of a process: the real command, with a smaller model."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job.out / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    importlib.import_module("faulthandler").dump_traceback_later(PATIENCE - 5)
    shrink_models()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # one thread of torch, whatever the machine
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
    """Make the pico models smaller still: a tenth of a million parameters."""
    from models import factory

    small = {"width": 8, "stages": (1, 1, 1, 1), "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    for name in ("hiera_pico_96", "hiera_pico_16x64"):
        factory.CONFIGS[name] = replace(factory.CONFIGS[name], **small)


def torchrun_environment(job: Job, rank: int) -> dict[str, str]:
    """What torchrun's agent gives to a worker."""
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
    """Start the server that the processes come from; its imports take seconds, on a busy machine a minute."""
    process = CLEAN.Process(target=shrink_models)
    process.start()
    process.join(300)
    assert process.exitcode == 0, "the fork server does not work"


def launch(job: Job) -> Ended:
    """Run a command to its end, however that comes; where one of its processes fails the others are ended."""
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
    """Wait as torchrun does: after the first failure the others get SIGTERM. Gives what is wrong."""
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
    counted = [note for note in notes if note["struck"] == struck]  # the others went a little further
    stdout, stderr = (
        "".join(path.read_text() for path in sorted(job.out.glob(f"{name}-*")))
        for name in ("stdout", "stderr")
    )
    train, evaluate = (max((n[key] for n in counted), default=0) for key in ("train", "evaluate"))
    return Ended(codes, stdout, stderr, struck, train, evaluate, seconds)


def words_of(preset: str, settings: Mapping[str, object]) -> tuple[str, ...]:
    """A preset and settings by dotted name, as the words of a command."""
    words = [preset]
    for key, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return tuple(words)


def valid_checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints that their digests confirm."""
    steps = []
    for path in sorted(run.glob("checkpoints/step-*.pt")):
        note = path.with_suffix(".sha256")
        if note.exists() and note.read_text().split()[:1] == [hashlib.sha256(path.read_bytes()).hexdigest()]:
            steps.append(int(path.stem.partition("-")[2]))
    return steps


def load_checkpoint(run: Path, step: int) -> dict:
    return torch.load(run / f"checkpoints/step-{step:09d}.pt", map_location="cpu", weights_only=True)


def snapshot(run: Path) -> dict[str, str]:
    """The digest of every file of a run that a refused start must leave as it was."""
    kept = (path for path in sorted(run.rglob("*")) if path.is_file())
    kept = (path for path in kept if path.name not in (".lock", "log.txt", "env.json"))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def equal(a: object, b: object) -> bool:
    """Whether nested values and tensors are equal to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def close(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that weights are equal to rounding; softmax ignores the key's bias, whose gradient is noise."""
    for name, value in expected.items():
        mine = weights[name]
        if name.endswith("attn.qkv.bias"):
            mine, value = (x.view(3, -1)[[0, 2]] for x in (mine, value))
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# ---- data and undisturbed runs -----------------------------------------------------------------------------


def damage_frame(data: Path, sample: int) -> None:
    """Overwrite the bytes of a training sample."""
    catalogue = open_catalogue(data, "train")
    with catalogue.tar_path(int(catalogue.shard[sample])).open("r+b") as tar:
        tar.seek(int(catalogue.offset[sample]))
        tar.write(bytes(int(catalogue.size[sample])))


@dataclass(frozen=True)
class Leg:
    """The steps after `start`, up to the next leg: what decides their result."""

    start: int
    settings: tuple[tuple[str, object], ...]
    damaged: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    program: str
    preset: str
    loss: str
    """The column of the training loss."""
    base: tuple[tuple[str, object], ...]


SHARED = {"optim.batch": 4, "optim.lr_batch": 4, "optim.epochs": 2.0, "optim.warmup_epochs": 1.0}
SPEED = {"speed.device": "cpu", "speed.threads": 1, "speed.timeout": 30, "speed.eval_batch": 4}
EVERY_STEP = {
    "data.max_bad": 0.5,
    "run.log_every": 1,
    "run.eval_every": 1,
    "run.checkpoint_every": 1,
    "run.keep": 99,
}
KINDS = {
    "finetune": Kind(
        "train.finetune", "image-ft-pico", "loss", tuple(sorted({**SHARED, "data.size": 32}.items()))
    ),
    "mae": Kind(
        "train.mae", "image-mae-pico", "loss_train", tuple(sorted({**SHARED, "data.size": 64}.items()))
    ),
}
SAMPLES = 20  # to train on: 5 steps an epoch
MOST_TRACES = 40


def steps_of(settings: Mapping[str, Any]) -> int:
    """Steps of a run; SAMPLES / batch is a whole number here, and epochs count fifths."""
    return round(settings["optim.epochs"] * SAMPLES / settings["optim.batch"])


@dataclass(frozen=True)
class Layout:
    """How a global batch is divided."""

    processes: int = 1
    micro: int = 4

    @property
    def accumulate(self) -> int:
        return max(1, 4 // self.processes // self.micro)

    @property
    def same(self) -> tuple[int, int]:
        """Equal for layouts that compute the same to the bit."""
        return self.processes, self.accumulate


@dataclass(frozen=True)
class Trace:
    """A run that nothing disturbed, with a row, an evaluation and a checkpoint at every step."""

    run: Path
    rows: dict[int, dict]

    def checkpoint(self, step: int) -> dict:
        return load_checkpoint(self.run, step)


class Bench:
    """A place for runs, their data, and the undisturbed runs that they are compared with."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.clean = root, data
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._data: dict[tuple[int, ...], Path] = {(): data}
        self._traces: dict[tuple, Trace] = {}

    def folder(self, name: str) -> Path:
        return self.root / f"{name}-{next(self._numbers)}"

    def start(
        self, kind: Kind, settings: Mapping, run: Path, layout: Layout, moment: Moment | None = None
    ) -> Ended:
        """Run the command with these settings in the folder `run`."""
        place = {"run.root": run.parent, "run.name": run.name, "speed.micro_batch": layout.micro}
        words = words_of(kind.preset, {**SPEED, **settings, **place})
        out = run.with_name(f"{run.name}.out")
        ended = launch(Job(kind.program, words, run, out, layout.processes, moment))
        what = f"{layout.processes} processes"
        self.counts[what] += 1
        self.seconds[what] += ended.seconds
        return ended

    def damaged_data(self, samples: Iterable[int]) -> Path:
        """A copy of the data with these samples damaged."""
        key = tuple(sorted(samples))
        if key not in self._data:
            self._data[key] = self.folder("data")
            shutil.copytree(self.clean, self._data[key])
            for sample in key:
                damage_frame(self._data[key], sample)
        return self._data[key]

    def trace(self, kind: Kind, layout: Layout, legs: tuple[Leg, ...]) -> Trace:
        """The undisturbed run whose settings and data changed at the starts of these legs."""
        key = (kind.program, layout.same, legs)
        if key in self._traces:
            self._traces[key] = self._traces.pop(key)  # used last, dropped last
            return self._traces[key]
        run, (leg, before) = self.folder("whole"), (legs[-1], legs[:-1])
        settings = {**dict(leg.settings), **EVERY_STEP, "data.path": self.damaged_data(leg.damaged)}
        if before:
            _copy_up_to(self.trace(kind, layout, before).run, run, leg.start)
            changed = [k for k, v in leg.settings if dict(before[-1].settings).get(k) != v]
            settings |= {"run.allow": tuple(changed)} if changed else {}
        ended = self.start(kind, settings, run, layout)
        assert ended.code == 0, f"the undisturbed run failed: {ended}"
        self._traces[key] = Trace(run, {row["step"]: row for row in read_csv(run / "metrics.csv")})
        while len(self._traces) > MOST_TRACES:
            shutil.rmtree(self._traces.pop(next(iter(self._traces))).run)
        return self._traces[key]


def _copy_up_to(source: Path, run: Path, step: int) -> None:
    """A copy of a run as it was at a step."""
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "data.json", "env.json", "metrics.csv"):
        shutil.copy(source / name, run / name)
    for suffix in ("pt", "sha256"):
        name = f"checkpoints/step-{step:09d}.{suffix}"
        shutil.copy(source / name, run / name)
