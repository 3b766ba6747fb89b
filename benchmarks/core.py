"""Time that the training loop adds to a step: python -m benchmarks core

A model of one weight is trained on one black batch, by the loop with its log, metrics, meters and progress,
and by a plain `for` with the same loss and optimizer. The difference per step is the cost of the loop.
Checkpoints and evaluation are not included.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from benchmarks.results import Results, show
from models.hiera import HieraConfig
from models.layers import NormalizedInput
from pipelines.dataset import open_dataset
from pipelines.errors import run_cli
from pipelines.loader import Batch, blank_batch
from tools.pack import ImageOptions, pack_images
from train import build, loop
from train.config import Config
from train.metrics import MAE_COLUMNS, read_csv
from train.optim import make_optimizer, set_learning_rate, update
from train.presets import MAE_PRESETS
from train.rundir import Run
from train.task import Task

SAMPLES = 64  # pictures in the dataset


class Nothing(nn.Module):
    """A model of one weight without computation."""

    def __init__(self) -> None:
        super().__init__()
        self.config = HieraConfig()
        self.weight = nn.Linear(1, 1)

    def no_weight_decay(self) -> set[str]:
        """As in Encoder."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """As in Encoder."""
        return {"stem": "^weight", "blocks": r"^blocks\.(\d+)"}

    def forward(self, x: Tensor) -> Tensor:
        return self.weight(x.flatten()[:1]).sum()


def make_task(config: Config, _: Run) -> Task:
    """A task whose loss is the model's output."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.pixels)

    return Task(
        model=Nothing(),
        loss=loss,
        evaluate=lambda *_: {"loss_val": 0.0},
        columns=MAE_COLUMNS,
        loss_column="loss_train",
        train=open_dataset(config.data.path, "train"),
    )


def bare(config: Config, batch: Batch, steps: int) -> float:
    """Seconds per step of a plain loop."""
    model = Nothing()
    optimizer = make_optimizer(model, config.optim)
    ready = NormalizedInput(model, 1)
    start = time.perf_counter()
    for step in range(steps):
        set_learning_rate(optimizer, config.optim, step, SAMPLES)
        ready(batch.pixels).backward()
        update(model, optimizer, 0.0)
    return (time.perf_counter() - start) / steps


def ours(config: Config, batch: Batch) -> float:
    """Seconds per step of the training core, from its own metrics."""

    def batches(*_: Any) -> Iterator[Batch]:
        while True:
            yield batch

    real = build.training_batches
    build.training_batches = batches  # pyrefly: ignore
    try:
        loop.fit(config, make_task)
    finally:
        build.training_batches = real
    rows = read_csv(config.run.root / config.run.name / "metrics.csv")
    return median(row["step_ms"] for row in rows[1:]) / 1e3


def run(steps: int = 2000, rounds: int = 5) -> Results:
    """Milliseconds per step of both; a difference of 1 ms is 1 % of a step of 100 ms.

    Args:
        steps: steps per round.
        rounds: rounds of each; they take turns.
    """
    times: dict[str, list[float]] = {"our loop": [], "a bare loop": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for number in range(SAMPLES):
            path = work / "source" / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((40, 40, 3), 4 * number, np.uint8)).save(path)
        pack_images(work / "source", work / "shards", ImageOptions(workers=1, val_fraction=0.0))
        config = MAE_PRESETS["image-mae-pico"]
        config = replace(config, data=replace(config.data, path=work / "shards", size=32))
        config = replace(config, speed=replace(config.speed, device="cpu", micro_batch=64))
        optim = replace(config.optim, epochs=steps * config.optim.batch / SAMPLES, warmup_epochs=0)
        batch = blank_batch(config.data, 64, torch.device("cpu"))
        for number in range(rounds):
            run = replace(config.run, root=work, name=str(number), log_every=50, checkpoint_every=10**9)
            now = replace(config, run=run, optim=optim)
            times["our loop"].append(1e3 * ours(now, batch))
            times["a bare loop"].append(1e3 * bare(now, batch, steps))
    return {"a step of a model that does nothing": {name: {"ms": values} for name, values in times.items()}}


if __name__ == "__main__":
    run_cli(lambda: show(tyro.cli(run, description=__doc__)))
