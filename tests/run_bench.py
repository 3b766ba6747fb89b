"""The uninterrupted runs with which the state machine compares its runs, and the comparisons."""

import hashlib
import itertools
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipelines.dataset import open_dataset
from tests.run_machine import Ended, Job, Moment, launch
from train.metrics import read_csv

Settings = dict[str, Any]


def words_of(preset: str, settings: Mapping[str, object]) -> tuple[str, ...]:
    """The arguments of a command: a preset, and settings by dotted name."""
    words = [preset]
    for key, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return tuple(words)


def valid_checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints with correct digests."""
    steps = []
    for path in sorted(run.glob("checkpoints/step-*.pt")):
        note = path.with_suffix(".sha256")
        if note.exists() and note.read_text().split()[:1] == [hashlib.sha256(path.read_bytes()).hexdigest()]:
            steps.append(int(path.stem.partition("-")[2]))
    return steps


def load_checkpoint(run: Path, step: int) -> dict:
    return torch.load(run / f"checkpoints/step-{step:09d}.pt", map_location="cpu", weights_only=True)


def snapshot(run: Path) -> dict[str, str]:
    """The digests of the files of a run that a refused start must not change."""
    kept = (path for path in sorted(run.rglob("*")) if path.is_file())
    kept = (path for path in kept if path.name not in (".lock", "log.txt", "env.json"))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def exported_step(run: Path) -> int | None:
    """The step of a run's final weights; None if there are none."""
    path = run / "model.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["hiera-train"])["step"]


def alike(a: object, b: object) -> bool:
    """Whether a setting read from JSON equals a configured one."""
    b = list(b) if isinstance(b, tuple) else str(b) if isinstance(b, Path) else b
    return a == b


def early_codes(moment: Moment) -> set[int]:
    """The possible exit codes of a process that gets a signal before it handles signals."""
    number = signal.Signals[moment.signal]
    return {-number, 128 + number}


def first_difference(mine: list[dict], expected: list[dict]) -> dict:
    pairs = ((a, b) for a, b in zip(mine, expected, strict=True) if a != b)
    a, b = next(pairs)
    return {key: (a.get(key), b.get(key)) for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def equal(a: object, b: object) -> bool:
    """Whether nested values and tensors are bit-equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def close(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that each tensor is equal up to rounding, by its root mean square.

    AdamW amplifies the rounding of an element whose gradient is almost zero: one may differ by more. The
    key's bias has no effect: softmax ignores it.
    """
    for name, value in expected.items():
        mine = weights[name]
        if name.endswith("attn.qkv.bias"):
            mine, value = (x.view(3, -1)[[0, 2]] for x in (mine, value))
        apart, scale = ((x.double() ** 2).mean().sqrt().item() for x in (mine - value, value))
        assert apart <= 1e-5 + 1e-4 * scale, f"{name}: the difference is {apart:.2g}, the values {scale:.2g}"


# ---- data and uninterrupted runs ---------------------------------------------------------------------------


def damage_frame(data: Path, sample: int) -> None:
    """Overwrite the bytes of a training sample."""
    catalogue = open_dataset(data, "train")
    with catalogue.tar_path(int(catalogue.shard[sample])).open("r+b") as tar:
        tar.seek(int(catalogue.offset[sample]))
        tar.write(bytes(int(catalogue.size[sample])))


@dataclass(frozen=True)
class Leg:
    """The steps after `start` up to the next leg, and what determines their result."""

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


SHARED = {
    "model.drop_path": 0.2,
    "optim.batch": 4,
    "optim.lr_batch": 4,
    "optim.epochs": 2.0,
    "optim.warmup_epochs": 1.0,
}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "model.dropout": 0.1}
SPEED = {"speed.device": "cpu", "speed.threads": 1, "speed.timeout": 60, "speed.eval_batch": 4}
EVERY_STEP = {
    "data.max_bad": 0.5,
    "run.log_every": 1,
    "run.eval_every": 1,
    "run.checkpoint_every": 1,
    "run.keep": 99,
}
KINDS = {
    "finetune": Kind(
        "train.finetune", "image-ft-pico", "loss", tuple(sorted({**SHARED, **MIXED, "data.size": 32}.items()))
    ),
    "mae": Kind(
        "train.mae", "image-mae-pico", "loss_train", tuple(sorted({**SHARED, "data.size": 64}.items()))
    ),
}
SAMPLES = 20  # in the training split: 5 steps per epoch
MOST_TRACES = 40


def steps_of(settings: Mapping[str, Any]) -> int:
    """Steps of a run; SAMPLES / batch is an integer here, and epochs are multiples of 0.2."""
    return round(settings["optim.epochs"] * SAMPLES / settings["optim.batch"])


@dataclass(frozen=True)
class Layout:
    """The division of a global batch."""

    processes: int = 1
    micro: int = 4

    @property
    def accumulate(self) -> int:
        return max(1, 4 // self.processes // self.micro)

    @property
    def same(self) -> tuple[int, int]:
        """Equal for layouts with bit-equal results."""
        return self.processes, self.accumulate


@dataclass(frozen=True)
class Trace:
    """An uninterrupted run with a row, an evaluation and a checkpoint at every step."""

    run: Path
    rows: dict[int, dict]
    groups: list[list[dict]]
    """The hyperparameters of the optimizer's groups at each step after the last leg's start."""

    def checkpoint(self, step: int) -> dict:
        return load_checkpoint(self.run, step)


class Bench:
    """A folder for runs, their data, and the uninterrupted runs for comparison."""

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
        self,
        kind: Kind,
        settings: Mapping,
        run: Path,
        layout: Layout,
        moment: Moment | None = None,
        slow: str = "",
    ) -> Ended:
        """Run the command with these settings in the folder `run`."""
        place = {"run.root": run.parent, "run.name": run.name, "speed.micro_batch": layout.micro}
        words = words_of(kind.preset, {**SPEED, **settings, **place})
        out = run.with_name(f"{run.name}.out")
        ended = launch(Job(kind.program, words, run, out, layout.processes, moment, slow=slow))
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
        """The uninterrupted run whose settings and data changed at the starts of these legs."""
        key = (kind.program, layout.same, legs)
        if key in self._traces:
            self._traces[key] = self._traces.pop(key)  # most recently used
            return self._traces[key]
        run, (leg, before) = self.folder("whole"), (legs[-1], legs[:-1])
        settings = {**dict(leg.settings), **EVERY_STEP, "data.path": self.damaged_data(leg.damaged)}
        if before:
            _copy_up_to(self.trace(kind, layout, before).run, run, leg.start)
            changed = [k for k, v in leg.settings if dict(before[-1].settings).get(k) != v]
            settings |= {"run.allow": tuple(changed)} if changed else {}
        ended = self.start(kind, settings, run, layout)
        assert ended.code == 0, f"the undisturbed run failed: {ended}"
        rows = {row["step"]: row for row in read_csv(run / "metrics.csv")}
        self._traces[key] = Trace(run, rows, ended.groups)
        while len(self._traces) > MOST_TRACES:
            shutil.rmtree(self._traces.pop(next(iter(self._traces))).run)
        return self._traces[key]


def _copy_up_to(source: Path, run: Path, step: int) -> None:
    """Copy a run in its state at a step."""
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "data.json", "env.json", "metrics.csv"):
        shutil.copy(source / name, run / name)
    for suffix in ("pt", "sha256"):
        name = f"checkpoints/step-{step:09d}.{suffix}"
        shutil.copy(source / name, run / name)
