"""Pictures of what a masked autoencoder sees and fills in."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from models.inputs import NormalizedInput
from pipelines.dataset import Dataset
from pipelines.files import atomic_write
from pipelines.order import keep_units
from train import setup
from train.config import MaeConfig
from train.distributed import World
from train.evaluate import batches_of

SHOWN_SAMPLES, SHOWN_FRAMES = 6, 4
GAP, HEADER = 4, 16


@torch.no_grad()
def save_reconstructions(
    config: MaeConfig,
    device: torch.device,
    path: Path,
    model: NormalizedInput,
    catalogue: Dataset,
    rows: int = SHOWN_SAMPLES,
) -> None:
    """Write a PNG: input, what was kept, and reconstruction of the first `rows` samples; clips as strips.

    The prediction is in units of each patch's own mean and deviation, so the true ones colour it: the picture
    says so in its title.
    """
    from models.mae import reconstruct

    units, kept = setup.check_masking(config, model.model)
    batch = next(batches_of(config, World(0, 1, device), catalogue, (1, 1), rows))
    count = int(batch.valid.sum())
    inputs = model.normalize(batch.pixels)[:count]
    keep = torch.from_numpy(keep_units(0, batch.epochs, batch.ids, units, kept))[:count].to(device)
    model.eval()
    filled = reconstruct(model.model, inputs, keep)  # pyrefly: ignore
    if inputs.ndim == 5:
        inputs = inputs[:, :, :: inputs.shape[2] // filled.shape[2]]
    visible = _visible(model.model, keep, inputs)
    columns = [_pixels(model.restore(x)) for x in (inputs, torch.where(visible, inputs, 0.0), filled)]
    with atomic_write(path) as temporary:
        _grid(columns).save(temporary, format="png")


def _visible(model: nn.Module, keep: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Bool [b, 1, (t), h, w]: which pixels belong to kept mask units."""
    grid: tuple[int, ...] = model.mask_units  # pyrefly: ignore
    mask = torch.zeros(len(keep), model.num_mask_units, device=keep.device)  # pyrefly: ignore
    mask = mask.scatter(1, keep, 1.0).view(len(keep), 1, *grid)
    return nn.functional.interpolate(mask, size=inputs.shape[2:], mode="nearest") > 0.5


def _pixels(x: torch.Tensor) -> np.ndarray:
    """[b, (t), h, w, 3] of 0 to 255 -> uint8 [b, h, columns, 3], frames side by side."""
    if x.ndim == 5:
        frames = np.linspace(0, x.shape[1] - 1, SHOWN_FRAMES).round().astype(int).tolist()
        x = torch.cat([x[:, f] for f in frames], dim=2)
    return x.clamp(0, 255).round().byte().cpu().numpy()


def _grid(columns: list[np.ndarray]) -> Image.Image:
    rows, height, width, _ = columns[0].shape
    bottom = HEADER + rows * (height + GAP)
    sheet = Image.new("RGB", (len(columns) * (width + GAP), bottom + HEADER), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, bottom), "patches have their true mean and deviation", fill="black")
    for c, (column, title) in enumerate(zip(columns, ("input", "kept", "reconstruction"), strict=True)):
        draw.text((c * (width + GAP) + 2, 2), title, fill="black")
        for r in range(rows):
            sheet.paste(Image.fromarray(column[r]), (c * (width + GAP), HEADER + r * (height + GAP)))
    return sheet
