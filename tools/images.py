"""Reading and strict decoding: every frame in a shard is a JPEG that all decoders accept.

One bad JPEG ends a DALI pipeline. So a correct file is kept byte for byte, another one is converted (and the
change is recorded) or rejected (with a reason).
"""

import errno
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile, ImageOps

from tools.jpeg import CUT, ENDED, ORIENTATION, START, BadImage, Jpeg, decode, has_clear_exif, load, read_jpeg
from tools.opening import KINDS_OF_SAMPLES, open_picture, tag, why_not_decoded, without_metadata

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
QUALITY = 90
COPIED = "copied"
# Errors of storage that is temporarily unavailable; they say nothing about the file.
TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.ENOTCONN,
        errno.ECONNRESET,
    }
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)
PAUSES = (0.2, 1.0, 5.0)  # seconds before a failed read is repeated

warnings.filterwarnings("ignore", module="PIL")  # each odd EXIF block would print two lines
Image.core.set_block_size((1 << 31) - 4096)  # the pixels of a picture are one array, which needs no copy
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before any pixel is decoded
ImageFile.LOAD_TRUNCATED_IMAGES = False


@dataclass(frozen=True)
class Packed:
    """A sample's frames (for a picture, one) as JPEGs of one size, and what was changed."""

    frames: Sequence[bytes]
    size: tuple[int, int]  # width, height
    change: str
    span: str = ""  # of a clip that is part of a longer one: "#t=START,END", seconds
    row: dict[str, object] = field(default_factory=dict)  # what a tar says of it: see tools/tars.py


Part = Packed | BadImage  # a sample, or the reason why a part of a source is rejected
Read = Callable[[str], Iterator[Part]]  # the samples of a path below the source folder


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises `OSError`, or `BadImage` for a pipe or device, which could block forever."""
    if not S_ISREG(path.stat().st_mode):
        raise BadImage("not a regular file")
    return path.read_bytes()


def mode_of(path: Path) -> int:
    """`st_mode` of a path, 0 if it does not exist. Raises `OSError`, which `Path.is_dir` may hide."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def read_source(read: Read, paths: Sequence[str], pauses: Sequence[float]) -> Iterator[tuple[str, Part]]:
    """(path, sample) for each sample of the first of `paths` that can be packed.

    Raises `BadImage`, with the reason of the first path, or `OSError`.
    """
    problems: list[BadImage] = []
    started = False
    for path in paths:
        try:
            for part in repeated(read, path, pauses):
                started = True
                yield path, part
            return
        except BadImage as error:
            if started:
                raise
            problems.append(error)
    raise problems[0]


def repeated(read: Read, path: str, pauses: Sequence[float]) -> Iterator[Part]:
    """Read a path; if the storage fails, read it again after each of the `pauses` (seconds).

    Raises `BadImage` or `OSError`.
    """
    count = 0  # of the samples that an earlier try has read
    for pause in (*pauses, None):
        try:
            for part in islice(read(path), count, None):
                count += 1
                yield part
            return
        except OSError as error:
            if pause is None or error.errno not in TRANSIENT:
                raise
        time.sleep(pause)


# ---- pictures --------------------------------------------------------------------------------------------


def prepare(data: bytes, short_side: int, max_pixels: int, size: tuple[int, int] | None = None) -> Packed:
    """Decode `data` strictly; return it unchanged if it is correct, otherwise as a JPEG of quality 90.

    If the shorter side is larger than `short_side`, the picture is scaled down to it, antialiased. `size`:
    resize to this (width, height) instead. Raises `BadImage` with the reason.
    """
    try:
        return _prepare(data, short_side, max_pixels, size)
    except BadImage:
        plain = without_metadata(data)
        if plain == data:
            raise
    packed = _prepare(plain, short_side, max_pixels, size)
    changes = [] if packed.change == COPIED else [packed.change]
    return replace(packed, change=", ".join([*changes, "damaged metadata left out"]))


def _prepare(data: bytes, short_side: int, max_pixels: int, size: tuple[int, int] | None) -> Packed:
    jpeg = read_jpeg(data) if data.startswith(START) else None
    picture = open_picture(io.BytesIO(jpeg.data if jpeg else data), max_pixels)
    full, pixels = picture.size, None
    try:
        if jpeg:
            side = 2 * max(size or fitted(full, short_side))
            pixels = decode(jpeg, picture, side)
            picture = load(jpeg, side) if pixels is None else image_of(pixels, picture.info)
        else:
            _forget_xmp(picture)  # here, because Pillow turns a TIFF while it loads it
            picture.load()
        orientation = _orientation(picture)
        upright, changes = _normal(picture, orientation, jpeg)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # for hostile bytes, decoders raise nearly every type of error
        raise BadImage(why_not_decoded(picture, error)) from error
    goal = size or fitted(full[::-1] if orientation >= 5 else full, short_side)
    if upright.size != goal:
        upright = resized(upright, goal, pixels if upright is picture else None)
        changes.append("resized")
    if not changes:
        return Packed([data], upright.size, COPIED)
    data = jpeg.data if jpeg and {*changes} <= {CUT, ENDED} else encode(upright)
    return Packed([data], upright.size, ", ".join(changes))


def fitted(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height), scaled so that its shorter side is at most `short_side`."""
    scale = min(1.0, short_side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def encode(picture: Image.Image) -> bytes:
    """A baseline JPEG of the pixels, without metadata."""
    picture.info = {}
    out = io.BytesIO()
    try:
        picture.save(out, "JPEG", quality=QUALITY)
    except OSError as error:  # a side above 65,535 pixels
        raise BadImage("too long or too wide for a JPEG") from error
    return out.getvalue()


def resized(picture: Image.Image, size: tuple[int, int], pixels: np.ndarray | None = None) -> Image.Image:
    """The picture, in mode L, RGB or RGBX, scaled to (width, height). pixels: its own, if known."""
    from tools.resize import bicubic  # loads torch's library, and copied pictures can do without

    return image_of(bicubic(pixels_of(picture) if pixels is None else pixels, size))


def pixels_of(picture: Image.Image) -> np.ndarray:
    """uint8 [height, width, 4 or 1] of a picture in mode RGB, RGBX or L, without a copy if possible."""
    if picture.readonly:  # its pixels belong to NumPy, and pyarrow would crash
        picture = picture.copy()
    color = picture.mode != "L"  # Pillow stores four bytes for each pixel, of which the fourth is unused
    try:
        stored = pa.array(picture)  # without a copy
    except ValueError as error:
        raise BadImage("more than 2 GiB of pixels") from error
    pixels = (stored.values if color else stored).to_numpy()
    return pixels.reshape(picture.height, picture.width, -1)


def image_of(pixels: np.ndarray, info: dict[str | tuple[int, int], Any] | None = None) -> Image.Image:
    """A picture in mode RGBX or L of the pixels uint8 [height, width, 4 or 1], without a copy."""
    mode = "L" if pixels.shape[2] == 1 else "RGBX"
    picture = Image.frombuffer(mode, pixels.shape[1::-1], pixels, "raw", mode, 0, 1)
    picture.info = info or {}
    return picture


# ---- changes of pixels -------------------------------------------------------------------------------------


def _forget_xmp(picture: Image.Image) -> None:
    """Remove XMP from what Pillow has read: its orientation alone does not count."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        picture.info.pop(name, None)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, or 0 if there is none; 5 and above swap the sides.

    A TIFF has none once it is loaded: Pillow turns it.
    """
    _forget_xmp(picture)
    exif = Image.Exif()
    try:
        if "exif" in picture.info:
            exif.load(picture.info["exif"])
        else:
            exif = picture.getexif()  # a PNG may hold it as text
        value = exif.get(ORIENTATION)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 0
    return value if isinstance(value, int) and 1 <= value <= 8 else 0


def _normal(picture: Image.Image, orientation: int, jpeg: Jpeg | None) -> tuple[Image.Image, list[str]]:
    """The picture upright in mode L, RGB or RGBX, and a list of the changes."""
    changes = [*jpeg.changes] if jpeg else [f"{picture.format} to JPEG"]
    upright: Image.Image = picture
    if jpeg and not has_clear_exif(jpeg.exif):
        changes.append("unclear EXIF left out")
    if orientation > 1:
        upright = ImageOps.exif_transpose(picture)
        changes.append("turned upright as its EXIF says")
    if upright.mode in ("L", "RGB", "RGBX") and "transparency" not in upright.info:
        return upright, changes
    if upright.mode.startswith("I;16") or (picture.format == "PPM" and upright.mode == "I"):
        changes.append("16 bit to 8 bit")
        return _eight_bit(picture, upright), changes
    if upright.mode in ("I", "F"):
        raise BadImage(KINDS_OF_SAMPLES)
    if upright.has_transparency_data:
        changes.append("transparency on white")
        page = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(page, upright.convert("RGBA")).convert("RGB"), changes
    changes.append(f"{upright.mode} to RGB")
    return upright.convert("RGB"), changes


def _eight_bit(picture: Image.Image, upright: Image.Image) -> Image.Image:
    """A gray picture of 9 to 16 bit as 8 bit."""
    tiff = picture.format == "TIFF"
    pixels = (np.asarray(upright) >> (tag(picture, 258, 16) if tiff else 16) - 8).astype(np.uint8)
    return Image.fromarray(~pixels if tiff and tag(picture, 262, 1) == 0 else pixels)
