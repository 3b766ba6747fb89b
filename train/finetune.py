"""Supervised finetuning: python -m train.finetune PRESET [--overrides].

python -m train.finetune image-ft-base --model.init runs/image-mae-base/model.safetensors --speed.processes 4
"""

import functools

import torch
from torch import nn
from torch.nn import functional

from pipelines.augment import to_device
from pipelines.dataset import Dataset
from pipelines.errors import UserError, run_cli
from pipelines.loader import Batch
from pipelines.order import row_keys
from train import loop, rundir, setup
from train.config import Config, FinetuneConfig, parse
from train.distributed import World
from train.evaluate import classifier_evaluation
from train.metrics import FINETUNE_COLUMNS
from train.mixing import Mixing, make_mixing, mix
from train.presets import FINETUNE_PRESETS, NOT_GIVEN
from train.setup import Autocast


def make_task(config: Config, catalogue: Dataset, world: World, autocast: Autocast) -> loop.Task:
    """The model and the two functions that make the loop a classifier's."""
    assert isinstance(config, FinetuneConfig)
    classes = len(catalogue.info.classes)
    if classes == 1:
        raise UserError(f"{config.data.path} has one class only; there is nothing to tell apart")
    if (catalogue.label < 0).any():
        raise UserError(f"{config.data.path} has samples without a class; finetuning needs labelled shards")
    model = setup.build_model(config, classes)
    mixing = make_mixing(config, classes)

    def loss(wrapped: nn.Module, batch: Batch) -> torch.Tensor:
        keys = to_device(row_keys(config.run.seed, batch.epochs, batch.ids), world.device)
        return mixed_loss(wrapped, batch, keys, mixing, config.smoothing)

    return loop.Task(
        model=model,
        loss=loss,
        evaluate=functools.partial(classifier_evaluation, config, world, autocast, rundir.folder_of(config)),
        columns=FINETUNE_COLUMNS,
        loss_column="loss",
    )


def mixed_loss(
    model: nn.Module, batch: Batch, keys: torch.Tensor, mixing: Mixing | None, smoothing: float
) -> torch.Tensor:
    """Cross-entropy of a batch, mixed and with soft labels where `mixing` says so.

    keys: int64 [b] on the device, from which the model draws drop path and dropout.
    """
    pixels, labels = batch.pixels, to_device(batch.labels, keys.device)
    if mixing is not None:
        pixels, labels = mix(mixing, pixels, labels, batch.positions)
        smoothing = 0.0  # the soft labels have it already
    return functional.cross_entropy(model(pixels, row_keys=keys).float(), labels, label_smoothing=smoothing)


def main() -> None:
    loop.main(parse(FINETUNE_PRESETS, "train.finetune", NOT_GIVEN), make_task)


if __name__ == "__main__":
    run_cli(main)
