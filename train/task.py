"""A task: everything that differs between pretraining and finetuning, and what both need to define one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipelines.catalogue import Catalogue, open_catalogue, read_info
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.inputs import Normalised
from pipelines.loader import Batch, ViewSpec, damage_limit, eval_batches, train_batches
from train.config import Config, ModelConfig
from train.distributed import World
from train.rundir import Run

Check = Callable[[], None]
Predictions = tuple[Tensor, Tensor, Tensor]
"""For n samples, on the device: labels int64 [n], valid bool [n], probabilities float32 [n, classes]."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the loop, the evaluation, the probes and the predictions need of a kind of training."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> mean loss of the batch, 0-D."""
    evaluate: Callable[[Normalised, Catalogue, Check], dict[str, float]]
    """(model, split, check) -> metric columns. All processes call it together. It calls `check` once per
    batch, which raises when a signal ends the evaluation."""
    columns: tuple[str, ...]
    """Of metrics.csv."""
    loss_column: str
    operations: float = 0.0
    """Floating-point operations of a step over all processes."""
    mixed: int = 1
    """Consecutive samples of a batch that are mixed with each other, and so stay in one micro batch."""
    train: Catalogue | None = None
    """None for a task that is not trained."""
    validation: Catalogue | None = None
    encoder: Callable[[], nn.Module] | None = None
    """Makes a classifier with this model's encoder, for its features; None: the model itself."""
    picture: Callable[[Path, Normalised, Catalogue, int], None] | None = None
    """(path, model, split, samples): draws what the model does with the first samples."""
    probabilities: Callable[[Normalised, Catalogue, Check], Iterator[Predictions]] | None = None
    """(model, split, check) -> the predictions of each batch."""

    @property
    def training(self) -> Catalogue:
        """The training split of a task that is trained."""
        assert self.train is not None
        return self.train


MakeTask = Callable[[Any, Run], Task]


def open_validation(data: DataConfig) -> Catalogue | None:
    """The split that is evaluated, None if there is none or it is empty."""
    if data.eval_split not in read_info(data.path).splits:
        return None
    catalogue = open_catalogue(data.path, data.eval_split)
    return catalogue if len(catalogue) else None


def create_model(data: DataConfig, model: ModelConfig, **settings: object) -> nn.Module:
    """A model at the configured input size; raises UserError when there is none of that name or size."""
    from models import create  # here: with timm it takes seconds, and a launcher does not need it

    size = (data.size, data.size) if data.frames == 1 else (data.frames, data.size, data.size)
    settings |= {
        "input_size": size,
        "drop_path_rate": model.drop_path,
        "abs_win": model.abs_win,
        "checkpoint_stages": model.checkpoint_stages,
    }
    try:
        return create(model.name, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def create_classifier(data: DataConfig, model: ModelConfig, classes: int) -> nn.Module:
    """A classifier of `classes`; raises UserError when the name is an autoencoder's."""
    if model.name.startswith("mae_"):
        raise UserError(
            f"finetuning wants a hiera_* model, not {model.name}; python -m models.zoo lists them"
        )
    return create_model(data, model, num_classes=classes, head_dropout=model.dropout)


def batches_of(
    config: Config, world: World, catalogue: Catalogue, views: tuple[int, int], samples: int = 0
) -> Iterator[Batch]:
    """This process's part of a split, in temporal x spatial `views`.

    samples: per batch; 0: as many as speed.eval_batch allows.
    """
    fitting = max(1, (config.speed.eval_batch or config.speed.micro_batch) // (views[0] * views[1]))
    return eval_batches(
        catalogue,
        view_spec(config.data, True),
        batch=samples or fitting,
        rank=world.rank,
        world=world.size,
        device=world.device,
        threads=config.speed.threads,
        temporal=views[0],
        spatial=views[1],
        max_bad=config.data.max_bad,
        hw_decoder_load=config.speed.hw_decoder_load,
        decode=config.speed.decode,
    )


def view_spec(data: DataConfig, evaluation: bool = False) -> Any:
    start = data.eval_clip_start if evaluation else data.clip_start
    shared = {f.name: getattr(data, f.name) for f in fields(ViewSpec) if hasattr(data, f.name)}
    return ViewSpec(start=start, crop_fraction=data.crop, **shared)


def training_batches(
    config: Config, world: World, catalogue: Catalogue, accumulate: int, start_step: int
) -> Iterator[Batch]:
    return train_batches(
        catalogue,
        view_spec(config.data),
        seed=config.run.seed,
        global_batch=config.optim.batch,
        rank=world.rank,
        world=world.size,
        accumulate=accumulate,
        start_step=start_step,
        device=world.device,
        threads=config.speed.threads,
        order=config.data.order,
        window=config.data.window,
        max_bad=config.data.max_bad,
        hw_decoder_load=config.speed.hw_decoder_load,
        decode=config.speed.decode,
    )


def check_damage(data: DataConfig, catalogue: Catalogue, seen: int) -> None:
    """Raise UserError when `seen`, the samples that all processes evaluated, leaves out too many."""
    missing, limit = len(catalogue) - seen, damage_limit(catalogue, data.max_bad)
    if missing > limit:
        raise UserError(
            f"{missing} of the {len(catalogue)} samples in {catalogue.parquet} are damaged, more than the "
            f"{limit} that data.max_bad allows; run `make verify DATA={catalogue.info.root}` and pack them "
            "again"
        )
