"""Pictures of the input, the kept patches and the reconstruction of a masked autoencoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from models.inputs import NormalizedInput
from pipelines.files import atomic_write
from pipelines.loader import Batch

SHOWN_FRAMES = 4
GAP, HEADER = 4, 16


@torch.no_grad()
def save_reconstructions(path: Path, model: NormalizedInput, batch: Batch, keep: Tensor) -> None:
    """Write a PNG with a row per valid sample: input, kept patches, reconstruction; clips as strips.

    keep: int64 [b, kept], the mask units that the model sees. It predicts each patch up to its mean and
    deviation, so the picture uses the true ones, and says so in its last line.
    """
    from models.mae import reconstruct

    count = int(batch.valid.sum())
    inputs, keep = model.normalize(batch.pixels)[:count], keep[:count]
    model.eval()
    filled = reconstruct(model.model, inputs, keep)  # pyrefly: ignore
    if inputs.ndim == 5:
        inputs = inputs[:, :, :: inputs.shape[2] // filled.shape[2]]
    seen = visible(model.model, keep, inputs)
    columns = [_pixels(model.restore(x)) for x in (inputs, torch.where(seen, inputs, 0.0), filled)]
    with atomic_write(path) as temporary:
        _grid(columns).save(temporary, format="png")


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
