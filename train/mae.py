"""MAE pretraining (arXiv 2111.06377, 2306.00989): python -m train.mae PRESET [--overrides].

python -m train.mae image-mae-base --data.path shards/imagenet --speed.processes 4
"""

import functools

import torch
from torch import nn

from pipelines.augment import to_device
from pipelines.dataset import Dataset
from pipelines.errors import run_cli
from pipelines.loader import Batch
from pipelines.order import keep_units, row_keys
from train import loop, pictures, rundir, setup
from train.config import Config, MaeConfig, parse
from train.distributed import World
from train.evaluate import mae_evaluation
from train.metrics import MAE_COLUMNS
from train.presets import MAE_PRESETS, NOT_GIVEN
from train.setup import Autocast


def make_task(config: Config, catalogue: Dataset, world: World, autocast: Autocast) -> loop.Task:
    """The model and the two functions that make the loop a masked autoencoder's."""
    assert isinstance(config, MaeConfig)
    model = setup.build_model(config)
    units, kept = setup.check_masking(config, model)
    seed = config.run.seed

    def loss(wrapped: nn.Module, batch: Batch) -> torch.Tensor:
        # Which units a sample keeps depends on (seed, epoch, sample) alone, so any process may draw it.
        keep = to_device(keep_units(seed, batch.epochs, batch.ids, units, kept), world.device)
        keys = to_device(row_keys(seed, batch.epochs, batch.ids), world.device)
        return wrapped(batch.pixels, keep=keep, row_keys=keys).loss

    return loop.Task(
        model=model,
        loss=loss,
        evaluate=functools.partial(mae_evaluation, config, world, autocast),
        columns=MAE_COLUMNS,
        loss_column="loss_train",
        picture=functools.partial(
            pictures.save_reconstructions,
            config,
            world.device,
            rundir.folder_of(config) / "reconstruction.png",
        ),
    )


def main() -> None:
    loop.main(parse(MAE_PRESETS, "train.mae", NOT_GIVEN), make_task)


if __name__ == "__main__":
    run_cli(main)
