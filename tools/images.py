"""Strict decoding: every frame in a shard is a JPEG that all decoders accept.

One bad JPEG ends a DALI pipeline. So a correct file is kept byte for byte, another one is converted (and the
change is recorded) or rejected (with a reason).
"""

import errno
import io
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile, ImageOps

from tools.jpeg import CUT, ENDED, ORIENTATION, START, BadImage, Jpeg, has_clear_exif, read_jpeg
from tools.jpeg import load as load_jpeg

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
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
# How files of other formats begin.
UNSUPPORTED = {
    "AVIF": rb".{4}ftyp(?=.{0,40}avi[fs])",
    "HEIC": rb".{4}ftyp(?:hei|hev|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG XR": rb"II\xbc",
    "JPEG-LS": rb"\xff\xd8\xff\xf7",
    "video": rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ",
    "HTML": rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)",
    "SVG": rb"(?:\xef\xbb\xbf)?\s*<(?:svg|.{0,1000}?<svg)",
    "Photoshop": rb"8BPS",
    "GIMP": rb"gimp xcf",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?(?:radiance|rgbe)",
    "Windows icon": rb"\0\0[\x01\x02]\0",
    "DirectDraw surface": rb"DDS ",
    "QOI": rb"qoif",
    "PAM": rb"P7\s",
    "NumPy": rb"\x93NUMPY",
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh",
    "xz": rb"\xfd7zXZ",
    "ZIP": rb"PK\x03\x04",
    "Git LFS pointer": rb"version https://git-lfs",
}

warnings.filterwarnings("ignore", module="PIL")  # each odd EXIF block would print two lines
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # torch only reads it
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


def prepare(data: bytes, short_side: int, max_pixels: int, size: tuple[int, int] | None = None) -> Packed:
    """Decode `data` strictly; return it unchanged if it is correct, otherwise as a JPEG of quality 90.

    If the shorter side is larger than `short_side`, the picture is scaled down to it, antialiased. `size`:
    resize to this (width, height) instead. Raises `BadImage` with the reason.
    """
    jpeg = read_jpeg(data) if data.startswith(START) else None
    stream = io.BytesIO(jpeg.source() if jpeg else data)
    picture = _open(stream, max_pixels)
    full = picture.size
    try:
        if jpeg:
            load_jpeg(picture, stream, jpeg, 2 * max(size or fitted(full, short_side)))
        else:
            _forget_xmp(picture)  # here, because Pillow turns a TIFF while it loads it
            picture.load()
        orientation = _orientation(picture)
        upright, changes = _normal(picture, orientation, jpeg)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # for hostile bytes, decoders raise nearly every type of error
        raise BadImage(_why_not_decoded(picture, error)) from error
    goal = size or fitted(full[::-1] if orientation >= 5 else full, short_side)
    if upright.size != goal:
        upright = resized(upright, goal)
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


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture, in mode L or RGB, scaled to (width, height): bicubic, antialiased.

    torch takes a sixth of the time of Pillow and differs by at most 2 levels.
    """
    import torch  # takes seconds, and copied pictures can do without

    color = picture.mode == "RGB"  # Pillow stores four bytes for each pixel, of which the fourth is unused
    mode, channels = ("RGBX", 4) if color else ("L", 1)
    try:
        stored = pa.array(picture)  # without a copy
    except ValueError as error:
        raise BadImage("more than 2 GiB of pixels") from error
    pixels = (stored.values if color else stored).to_numpy()
    out = np.empty((size[1], size[0], channels), np.uint8)
    planes, results = (
        torch.from_numpy(rows.reshape(1, height, width, channels)).permute(0, 3, 1, 2)
        for rows, (width, height) in ((pixels, picture.size), (out, size))
    )
    torch.ops.aten._upsample_bicubic2d_aa.out(planes, size[::-1], False, None, None, out=results)
    return Image.frombuffer(mode, size, out, "raw", mode, 0, 1)


# ---- opening -----------------------------------------------------------------------------------------------


def _open(stream: io.BytesIO, max_pixels: int) -> Image.Image:
    data = stream.getvalue()
    if not data:
        raise BadImage("empty file")
    try:
        picture = Image.open(stream, formats=FORMATS)
    except Exception as error:
        raise BadImage(_why_not_opened(data)) from error
    if picture.width * picture.height > max_pixels:
        raise BadImage(f"more than --max-pixels {max_pixels}")
    if picture.format == "BMP" and picture.info.get("compression") == 2:
        raise BadImage("BMP with RLE4 coding, which Pillow misreads")
    if picture.format == "TIFF" and _tag(picture, 284, 1) == 2 and _tag(picture, 258, 1) > 8:
        raise BadImage("TIFF with separate planes of 16 bit, which Pillow misreads")
    return picture


def _tag(picture: Image.Image, number: int, default: int) -> int:
    """The first value of a tag of a TIFF."""
    tags: Any = picture
    value = tags.tag_v2.get(number, default)
    return value[0] if isinstance(value, tuple) else value


def _why_not_opened(data: bytes) -> str:
    for name, start in UNSUPPORTED.items():
        if re.match(start, data, re.DOTALL | re.IGNORECASE):
            return f"{name}, which is not supported"
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(data[:16]):
            try:
                factory(io.BytesIO(data), "")
            except Exception as error:
                return _header_problem(name, error.__cause__ or error)
    return "not an image"


def _header_problem(name: str, error: BaseException) -> str:
    if isinstance(error, IndexError | TypeError | EOFError | struct.error):  # the data ends within it
        return f"{name} whose header is damaged"
    text = f"unknown value {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    return "truncated" if "truncated" in text.lower() else f"{name} that Pillow cannot read ({text})"


def _why_not_decoded(picture: Image.Image, error: Exception) -> str:
    if any(part in str(error).lower() for part in ("truncated", "not enough image data")):
        return "truncated"
    if picture.format == "TIFF":
        return "TIFF that is damaged or has an unsupported coding"
    return "damaged: it cannot be decoded"


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
    """The picture upright in mode L or RGB, and a list of the changes."""
    changes = [*jpeg.changes] if jpeg else [f"{picture.format} to JPEG"]
    upright: Image.Image = picture
    if jpeg and not has_clear_exif(jpeg.exif):
        changes.append("unclear EXIF left out")
    if orientation > 1:
        upright = ImageOps.exif_transpose(picture)
        changes.append("turned upright as its EXIF says")
    if upright.mode in ("L", "RGB") and "transparency" not in upright.info:
        return upright, changes
    if upright.mode.startswith("I;16") or (picture.format == "PPM" and upright.mode == "I"):
        changes.append("16 bit to 8 bit")
        return _eight_bit(picture, upright), changes
    if upright.mode in ("I", "F"):
        raise BadImage("signed, floating-point or 32-bit samples, which are not supported")
    if upright.has_transparency_data:
        changes.append("transparency on white")
        page = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(page, upright.convert("RGBA")).convert("RGB"), changes
    changes.append(f"{upright.mode} to RGB")
    return upright.convert("RGB"), changes


def _eight_bit(picture: Image.Image, upright: Image.Image) -> Image.Image:
    """A gray picture of 9 to 16 bit as 8 bit."""
    tiff = picture.format == "TIFF"
    pixels = (np.asarray(upright) >> (_tag(picture, 258, 16) if tiff else 16) - 8).astype(np.uint8)
    return Image.fromarray(~pixels if tiff and _tag(picture, 262, 1) == 0 else pixels)
