"""Strict decoding: every frame in a shard is a JPEG that all decoders accept.

One bad JPEG ends a DALI pipeline. So a correct file is kept byte for byte, another one is converted (and the
change is recorded) or rejected (with a reason).
"""

import errno
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import Image, ImageFile, ImageOps

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
CUT = "bytes after its end cut off"

warnings.filterwarnings("ignore", module="PIL")  # each odd EXIF block would print two lines
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before any pixel is decoded
ImageFile.LOAD_TRUNCATED_IMAGES = False


class BadImage(Exception):
    """A file that cannot be packed. Its text is the reason, the same for all files with one problem.

    span, row: as in `Packed`, of the part of the source that it concerns; without, of the whole source.
    """

    def __init__(self, reason: str, span: str = "", row: dict[str, object] | None = None) -> None:
        super().__init__(reason)
        self.span, self.row = span, row or {}


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
    data, changes = _whole_jpeg(data) if data[:2] == b"\xff\xd8" else (data, [])
    try:
        picture = _open(data, max_pixels)
        goal = size or fitted(_upright_size(picture), short_side)
        # The decoder may shrink large pictures 2, 4 or 8-fold, but not below twice the goal.
        picture.draft(None, (2 * max(goal), 2 * max(goal)))
        picture.load()
        upright, made = _normal(picture)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # for hostile bytes, decoders raise nearly every type of error
        truncated = "truncated" in str(error).lower()
        raise BadImage("truncated" if truncated else "damaged: it cannot be decoded") from error
    changes += made
    if upright.size != goal:
        upright = upright.resize(goal, Image.Resampling.BICUBIC)
        changes.append("resized")
    if not changes:
        return Packed([data], upright.size, COPIED)
    if changes != [CUT]:
        data = encode(upright)
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


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("empty file")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise BadImage("not an image, or its header is damaged") from error
    if picture.width * picture.height > max_pixels:
        raise BadImage(f"more than --max-pixels {max_pixels}")
    return picture


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (height, width) if _orientation(picture) >= 5 else (width, height)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, or 0 if there is none; 5 and above swap the sides."""
    value = picture.getexif().get(0x0112)
    return value if isinstance(value, int) and 1 <= value <= 8 else 0


def _doubtful_exif(picture: Image.Image) -> bool:
    """True if another decoder may find an orientation in EXIF data in which Pillow finds none."""
    exif = picture.info.get("exif", b"")
    return _orientation(picture) == 0 and (b"\x01\x12" in exif or b"\x12\x01" in exif)


def _normal(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """The picture upright in mode L or RGB, and a list of the changes."""
    changes = []
    if picture.format not in ("JPEG", "MPO"):
        changes.append(f"{picture.format} to JPEG")
    upright: Image.Image = picture
    if _doubtful_exif(picture):
        changes.append("unclear EXIF left out")
    if _orientation(picture) > 1:
        upright = ImageOps.exif_transpose(picture)
        changes.append("turned upright as its EXIF says")
    if upright.mode in ("L", "RGB") and "transparency" not in upright.info:
        return upright, changes
    if upright.mode.startswith("I;16"):
        changes.append("16 bit to 8 bit")
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)), changes
    if upright.mode in ("I", "F"):
        raise BadImage("samples of more than 16 bit")
    if upright.has_transparency_data:
        changes.append("transparency on white")
        page = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(page, upright.convert("RGBA")).convert("RGB"), changes
    changes.append(f"{upright.mode} to RGB")
    return upright.convert("RGB"), changes


def _whole_jpeg(data: bytes) -> tuple[bytes, list[str]]:
    """Follow the JPEG markers to the end marker; cut off what follows it.

    Decoders treat damaged markers differently: Pillow accepts a stream without an end marker, or with stray
    bytes between the segments of its header; DALI accepts neither.
    """
    changes = []
    end = 0
    for marker, start, strays in _markers(data):
        if strays and "stray bytes in its header left out" not in changes:
            changes.append("stray bytes in its header left out")
        if 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            changes.append("unusual JPEG coding made baseline")
        end = start + 2 if marker == 0xD9 else 0
    if not end:
        raise BadImage("truncated")
    if end < len(data):
        changes.append(CUT)
    return data[:end], changes


_NEXT_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")


def _markers(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """(code, byte offset, stray bytes before it) of each marker up to the end marker, if there is one.

    Coded pixels are between the header of a scan (0xDA) and the next marker. Before the first scan, each
    segment must follow the previous one directly.
    """
    position = 2
    in_header = True
    while found := _NEXT_MARKER.search(data, position):
        marker = found[1][0]
        yield marker, found.start(), in_header and found.start() != position
        if marker == 0xD9:
            return
        in_header = in_header and marker != 0xDA
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
