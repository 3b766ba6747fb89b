"""Supervised finetuning: python -m train.finetune PRESET [--overrides].

python -m train.finetune image-ft-base --model.init runs/image-mae-base/model.safetensors --speed.processes 4
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pipelines.catalogue import Catalogue
from pipelines.errors import UserError, run_cli
from pipelines.loader import Batch
from train import loop, rundir, setup
from train.config import Config, FinetuneConfig, parse
from train.distributed import World
from train.evaluate import classifier_evaluation
from train.metrics import FINETUNE_COLUMNS
from train.presets import FINETUNE_PRESETS, NOT_GIVEN
from train.setup import Autocast

if TYPE_CHECKING:
    from timm.data.mixup import Mixup


def make_task(config: Config, catalogue: Catalogue, world: World, autocast: Autocast) -> loop.Task:
    """The model and the two functions that make the loop a classifier's."""
    assert isinstance(config, FinetuneConfig)
    classes = len(catalogue.info.classes)
    if classes == 1:
        raise UserError(f"{config.data.path} has one class only; there is nothing to tell apart")
    if (catalogue.label < 0).any():
        raise UserError(f"{config.data.path} has samples without a class; finetuning needs labelled shards")
    model = setup.build_model(config, classes)
    mix = make_mixup(config, classes, world)

    def loss(wrapped: nn.Module, batch: Batch) -> torch.Tensor:
        return mixed_loss(wrapped, batch, mix, world.device, config.smoothing)

    return loop.Task(
        model=model,
        loss=loss,
        evaluate=functools.partial(classifier_evaluation, config, world, autocast, rundir.folder_of(config)),
        columns=FINETUNE_COLUMNS,
        loss_column="loss",
    )


def mixed_loss(
    model: nn.Module, batch: Batch, mix: "Mixup | None", device: torch.device, smoothing: float
) -> torch.Tensor:
    """Cross-entropy of a batch, mixed and with soft labels where `mix` says so."""
    pixels, labels = batch.pixels, loop.to_device(batch.labels, device)
    if mix is not None:
        # Time folds into channels: timm's box would otherwise cut time x height and mislabel.
        rows = pixels.movedim(-1, 1).float()
        folded, labels = mix(rows.flatten(1, -3), labels)
        pixels = folded.view(rows.shape).movedim(1, -1)
        smoothing = 0.0  # the soft labels have it already
    return functional.cross_entropy(model(pixels).float(), labels, label_smoothing=smoothing)


def make_mixup(config: FinetuneConfig, classes: int, world: World) -> "Mixup | None":
    """timm's Mixup (arXiv 1710.09412, 1905.04899), one draw per micro batch; None when both are off.

    Raises UserError for an odd micro batch, whose rows cannot be mixed in pairs.
    """
    if not (config.mixup or config.cutmix):
        return None
    micro, _ = setup.micro_batches(config, world)
    if micro % 2:
        raise UserError(
            f"mixup and cutmix want an even number of rows a forward pass, not {micro}; change optim.batch "
            f"({config.optim.batch}) or speed.micro_batch ({config.speed.micro_batch})"
        )
    from timm.data.mixup import Mixup

    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)


def main() -> None:
    loop.main(parse(FINETUNE_PRESETS, "train.finetune", NOT_GIVEN), make_task)


if __name__ == "__main__":
    run_cli(main)
