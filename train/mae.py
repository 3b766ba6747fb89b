"""MAE pretraining (arXiv 2111.06377, 2306.00989): python -m train.mae PRESET [--overrides].

python -m train.mae image-mae-base --data.path shards/imagenet --speed.processes 4
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from models.layers import NormalizedInput
from pipelines.augment import to_device
from pipelines.dataset import Dataset
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write
from pipelines.loader import Batch
from pipelines.order import keep_units, row_keys
from train import distributed, health, loop
from train.build import autocast_for
from train.config import MaeConfig
from train.console import parse
from train.distributed import World
from train.metrics import MAE_COLUMNS
from train.presets import MAE_PRESETS, NOT_GIVEN
from train.rundir import Run
from train.task import Check, Task, batches_of, check_damage, create_classifier, create_model, open_splits

if TYPE_CHECKING:
    from models.mae import MaeOutput  # importing the models takes seconds, and a launcher does not need them

# Of the pictures of reconstructions:
SHOWN_FRAMES = 4
TITLES = ("input", "visible patches", "reconstruction")
NOTES = {True: "patches have their true mean and deviation", False: "hidden patches as predicted"}
GAP, HEADER, WIDTH = 4, 22, 576  # pixels; pictures are enlarged up to about this width
STRIP, NEAREST = "#30363d", Image.Resampling.NEAREST


def make_task(config: MaeConfig, run: Run) -> Task:
    """Pretraining on the configured data."""
    from models.zoo import forward_macs

    train, validation = open_splits(config, run)
    task = task_of(config, run, train.info.classes)
    macs = forward_macs(task.model.config, True, config.mask_ratio)  # pyrefly: ignore
    operations = 6.0 * macs * config.optim.batch  # forward, and twice that backward
    task = replace(task, train=train, validation=validation, operations=operations)
    if not config.health or validation is None:
        return task
    parts = health.fixed_parts(train, validation)
    history = health.History()

    def evaluate_with_health(model: NormalizedInput, dataset: Dataset, check: Check) -> dict[str, float]:
        scores = task.evaluate(model, dataset, check)
        return scores | health.measure(config, run.world, parts, history, model, check)

    return replace(task, evaluate=evaluate_with_health)


def task_of(config: MaeConfig, run: Run, classes: Sequence[str]) -> Task:
    """The autoencoder with its loss, masks and evaluation; `classes` are those of its encoder's probes."""
    if not config.model.name.startswith("mae_"):
        raise UserError(
            f"MAE pretraining needs a mae_hiera_* model, not {config.model.name}; python -m models.zoo lists "
            "them"
        )
    model = create_model(
        config.data,
        config.model,
        decode_ratio=config.decode_ratio,
        normalize_targets=config.normalize_targets,
        decoder_heads=config.decoder_heads or None,
    )
    masking = masking_of(config.mask_ratio, model)
    encoder = replace(config.model, name=config.model.name.removeprefix("mae_"))
    return Task(
        model=model,
        loss=partial(masked_loss, config.run.seed, masking),
        row_losses=partial(masked_row_losses, config.run.seed, masking),
        evaluate=partial(evaluate, config, run, masking),
        columns=MAE_COLUMNS,
        loss_column="loss_train",
        encoder=lambda: create_classifier(config.data, encoder, len(classes)),
        picture=partial(draw, config, run.world, masking),
    )


class Masking(NamedTuple):
    """The number of mask units of a sample, and how many of them the encoder sees."""

    units: int
    kept: int


def masking_of(mask_ratio: float, model: nn.Module) -> Masking:
    """The masking of this model's samples; raises UserError for an impossible ratio."""
    units = getattr(model, "num_mask_units", 0)
    kept = int(units * (1 - mask_ratio))
    if not 0 < kept < units:
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {kept} of {units} mask units; choose a larger data.size, or a "
            "ratio that keeps and hides at least 1"
        )
    return Masking(units, kept)


def masked_loss(seed: int, masking: Masking, model: nn.Module, batch: Batch) -> Tensor:
    """The reconstruction loss of a batch. A sample's mask follows from (seed, epoch, sample) alone."""
    return _masked(seed, masking, model, batch).loss


def masked_row_losses(seed: int, masking: Masking, model: nn.Module, batch: Batch) -> Tensor:
    """The loss of each row of a batch, [b]; their mean is `masked_loss` up to rounding."""
    return _row_losses(_masked(seed, masking, model, batch), len(batch.ids))


def _masked(seed: int, masking: Masking, model: nn.Module, batch: Batch) -> "MaeOutput":
    keep = to_device(keep_units(seed, batch.epochs, batch.ids, *masking), batch.pixels.device)
    keys = to_device(row_keys(seed, batch.epochs, batch.ids), batch.pixels.device)
    return model(batch.pixels, keep=keep, row_keys=keys)


def _row_losses(output: "MaeOutput", rows: int) -> Tensor:
    return (output.pred.float() - output.label.float()).square().reshape(rows, -1).mean(1)


@torch.no_grad()
def evaluate(
    config: MaeConfig, run: Run, masking: Masking, model: NormalizedInput, dataset: Dataset, check: Check
) -> dict[str, float]:
    """Reconstruction loss with each sample's own fixed mask, comparable between steps and runs.

    NaN when the loss of any sample is. check: called once per batch; an error that it raises ends the
    evaluation. Raises UserError when too many samples are damaged.
    """
    world = run.world
    sums = torch.zeros(2, device=world.device, dtype=torch.float64)
    autocast = autocast_for(config.speed, world.device)
    model.eval()
    for batch in batches_of(config, world, dataset, (1, 1)):
        check()
        keep = evaluation_masks(batch, masking)
        with autocast():
            output = model(batch.pixels, keep=keep)
        losses = _row_losses(output, len(keep))
        valid = to_device(batch.valid, world.device)
        sums += torch.stack([torch.where(valid, losses, 0.0).sum(), valid.sum()])
    loss, count = distributed.total(sums).tolist()
    check_damage(config.data, dataset, int(count))
    return {"loss_val": loss / max(1.0, count)}


def evaluation_masks(batch: Batch, masking: Masking) -> Tensor:
    """The mask units that evaluation keeps, int64 [b, kept]: its epoch is always -1, so they never change."""
    return to_device(keep_units(0, batch.epochs, batch.ids, *masking), batch.pixels.device)


# ---- pictures


def draw(
    config: MaeConfig,
    world: World,
    masking: Masking,
    path: Path,
    model: NormalizedInput,
    dataset: Dataset,
    samples: int,
) -> None:
    """Draw the reconstructions of the first samples of a split."""
    batch = next(batches_of(config, World(0, 1, world.device), dataset, (1, 1), samples))
    save_reconstructions(path, model, batch, evaluation_masks(batch, masking))


@torch.no_grad()
def save_reconstructions(path: Path, model: NormalizedInput, batch: Batch, keep: Tensor) -> None:
    """Write a PNG with the input, kept patches and reconstruction of each valid sample; clips as strips.

    keep: int64 [b, kept], the mask units that the model sees. A model that predicts each patch up to its mean
    and deviation gets the true ones, and the last line of the picture says so.
    """
    from models.mae import reconstruct

    shown = to_device(batch.valid.nonzero()[0], keep.device)
    inputs, keep = model.normalize(batch.pixels)[shown], keep[shown]
    model.eval()
    filled = reconstruct(model.model, inputs, keep)  # pyrefly: ignore
    if inputs.ndim == 5:
        inputs = inputs[:, :, :: inputs.shape[2] // filled.shape[2]]
    seen = visible(model.model, keep, inputs)
    columns = [_pixels(model.restore(x)) for x in (inputs, torch.where(seen, inputs, 0.0), filled)]
    with atomic_write(path) as temporary:
        sheet, info = _sheet(columns, NOTES[model.model.config.normalize_targets])  # pyrefly: ignore
        sheet.save(temporary, format="png", pnginfo=info)


def visible(model: nn.Module, keep: Tensor, inputs: Tensor) -> Tensor:
    """Bool [b, 1, (t), h, w]: which pixels belong to kept mask units."""
    grid: tuple[int, ...] = model.mask_units  # pyrefly: ignore
    mask = torch.zeros(len(keep), model.num_mask_units, device=keep.device)  # pyrefly: ignore
    mask = mask.scatter(1, keep, 1.0).view(len(keep), 1, *grid)
    return nn.functional.interpolate(mask, size=inputs.shape[2:], mode="nearest") > 0.5


def _pixels(x: Tensor) -> np.ndarray:
    """[b, (t), h, w, 3] of 0 to 255 -> uint8 [b, h, columns, 3], frames side by side."""
    if x.ndim == 5:
        frames = np.linspace(0, x.shape[1] - 1, SHOWN_FRAMES).round().astype(int).tolist()
        x = torch.cat([x[:, f] for f in frames], dim=2)
    return x.clamp(0, 255).round().byte().cpu().numpy()


def _sheet(columns: list[np.ndarray], note: str) -> tuple[Image.Image, PngInfo]:
    """The samples below each other, and for a reader who takes them apart: "part height" and "zoom".

    The three pictures of an image are next to each other, the three strips of a clip below each other. Small
    ones are enlarged by `zoom`. The sheet is transparent and its texts have a background of their own, so
    that it can be read on a white and on a dark page.
    """
    samples, height, width, _ = columns[0].shape
    across = 1 if width > height else len(columns)
    zoom = max(1, WIDTH // (across * width))
    cell = (width * zoom + GAP, HEADER + height * zoom + GAP)
    part = len(columns) // across * cell[1]
    size = (across * cell[0] - GAP, samples * part + HEADER)
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)

    def write(text: str, x: int, y: int, wide: int) -> None:
        draw.rectangle((x, y, x + wide - 1, y + HEADER - 1), fill=STRIP)
        draw.text((x + 6, y + 2), text, fill="white", font=font)

    for c, (column, title) in enumerate(zip(columns, TITLES, strict=True)):
        for sample in range(samples):
            x, y = c % across * cell[0], sample * part + c // across * cell[1]
            write(title, x, y, width * zoom)
            picture = Image.fromarray(column[sample])
            sheet.paste(picture.resize((width * zoom, height * zoom), NEAREST), (x, y + HEADER))
    write(note, 0, samples * part, size[0])
    info = PngInfo()
    info.add_text("part height", str(part))
    info.add_text("zoom", str(zoom))
    return sheet, info


def main() -> None:
    loop.main(parse(MAE_PRESETS, "train.mae", NOT_GIVEN), make_task)


if __name__ == "__main__":
    run_cli(main)
