"""Pictures of the input, the kept patches and the reconstruction of a masked autoencoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from models.inputs import NormalizedInput
from pipelines.files import atomic_write
from pipelines.loader import Batch

SHOWN_FRAMES = 4
TITLES = ("input", "visible patches", "reconstruction")
NOTE = "patches have their true mean and deviation"
GAP, HEADER, WIDTH = 4, 22, 576  # pixels; pictures are enlarged up to about this width
STRIP, NEAREST = "#30363d", Image.Resampling.NEAREST


@torch.no_grad()
def save_reconstructions(path: Path, model: NormalizedInput, batch: Batch, keep: Tensor) -> None:
    """Write a PNG with the input, kept patches and reconstruction of each valid sample; clips as strips.

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
        sheet, info = _sheet(columns)
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


def _sheet(columns: list[np.ndarray]) -> tuple[Image.Image, PngInfo]:
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
    write(NOTE, 0, samples * part, size[0])
    info = PngInfo()
    info.add_text("part height", str(part))
    info.add_text("zoom", str(zoom))
    return sheet, info
