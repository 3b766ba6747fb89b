"""A task: everything that differs between pretraining and finetuning, and what both need to define one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.layers import NormalizedInput
from pipelines.config import DataConfig
from pipelines.dataset import Dataset, open_dataset, read_info
from pipelines.errors import UserError
from pipelines.loader import Batch, EvalLoader, damage_limit
from pipelines.machine import message
from pipelines.views import clip_notes
from train.config import Config, ModelConfig
from train.console import log
from train.distributed import World
from train.rundir import Run

Check = Callable[[], None]
Predictions = tuple[Tensor, Tensor, Tensor]
"""For n samples, on the device: ids int64 [n], valid bool [n], probabilities float32 [n, classes]."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the loop, the evaluation, the probes and the predictions need of a kind of training."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> mean loss of the batch, 0-D."""
    row_losses: Callable[[nn.Module, Batch], Tensor] | None = None
    """(model, batch) -> loss of each row [b], to inspect a step; None: steps are not inspected."""
    evaluate: Callable[[NormalizedInput, Dataset, Check], dict[str, float]]
    """(model, split, check) -> metric columns. All processes call it together. It calls `check` once per
    batch, which raises when a signal ends the evaluation."""
    columns: tuple[str, ...]
    """Of metrics.csv."""
    loss_column: str
    operations: float = 0.0
    """Floating-point operations of a step over all processes."""
    mixed: int = 1
    """Consecutive samples of a batch that are mixed with each other, and so stay in one micro batch."""
    train: Dataset | None = None
    """None for a task that is not trained."""
    validation: Dataset | None = None
    encoder: Callable[[], nn.Module] | None = None
    """Makes a classifier with this model's encoder, for its features; None: the model itself."""
    picture: Callable[[Path, NormalizedInput, Dataset, int], None] | None = None
    """(path, model, split, samples): draws what the model does with the first samples."""
    probabilities: Callable[[NormalizedInput, Dataset, Check], Iterator[Predictions]] | None = None
    """(model, split, check) -> the predictions of each batch."""

    @property
    def training(self) -> Dataset:
        """The training split of a task that is trained."""
        assert self.train is not None
        return self.train


MakeTask = Callable[[Any, Run], Task]


def open_splits(config: Config, run: Run) -> tuple[Dataset, Dataset | None]:
    """The training split, and the split that is evaluated if there is one; logs what they are."""
    train, validation = open_dataset(config.data.path, "train"), open_validation(config.data)
    kind, evaluated = train.info.kind, len(validation) if validation else 0
    log(
        f"data {config.data.path}: {len(train)} training and {evaluated} validation {kind}s, "
        f"{len(train.info.classes)} classes"
    )
    for line in (*message(run.world.device, config.speed.threads), *clip_notes(train, config.data)):
        log(line)
    if config.data.eval_split == "train":
        log(f"evaluation is on the TRAINING {kind}s: nothing is held out")
    return train, validation


def open_validation(data: DataConfig) -> Dataset | None:
    """The split that is evaluated, None if there is none or it is empty."""
    if data.eval_split not in read_info(data.path).splits:
        return None
    dataset = open_dataset(data.path, data.eval_split)
    return dataset if len(dataset) else None


def create_model(data: DataConfig, model: ModelConfig, **settings: object) -> nn.Module:
    """A model at the configured input size; raises UserError when there is none of that name or size."""
    from models import create  # here: with timm it takes seconds, and a launcher does not need it

    size = (data.size, data.size) if data.frames == 1 else (data.frames, data.size, data.size)
    settings |= {
        "input_size": size,
        "drop_path_rate": model.drop_path,
        "abs_win": model.abs_win or None,  # None: as the name
        "checkpoint_stages": model.checkpoint_stages,
    }
    return create(model.name, **settings)


def create_classifier(data: DataConfig, model: ModelConfig, classes: int) -> nn.Module:
    """A classifier of `classes`; raises UserError when the name is an autoencoder's."""
    if model.name.startswith("mae_"):
        raise UserError(
            f"finetuning needs a hiera_* model, not {model.name}; python -m models.zoo lists them"
        )
    return create_model(data, model, num_classes=classes, head_dropout=model.dropout)


def batches_of(
    config: Config, world: World, dataset: Dataset, views: tuple[int, int], samples: int = 0
) -> Iterator[Batch]:
    """This process's part of a split, in temporal x spatial `views`.

    samples: per batch; 0: as many as speed.eval_batch allows.
    """
    fitting = max(1, (config.speed.eval_batch or config.speed.micro_batch) // (views[0] * views[1]))
    loader = EvalLoader(dataset, config.data, config.speed, world, samples=samples or fitting, views=views)
    return iter(loader)


def check_damage(data: DataConfig, dataset: Dataset, seen: int) -> None:
    """Raise UserError when `seen`, the samples that all processes evaluated, leaves out too many."""
    missing, limit = len(dataset) - seen, damage_limit(dataset, data.max_bad)
    if missing > limit:
        raise UserError(
            f"{missing} of the {len(dataset)} samples in {dataset.catalogue} are damaged, more than the "
            f"{limit} that data.max_bad allows; run `make verify DATA={dataset.info.root}` and pack them "
            "again"
        )
