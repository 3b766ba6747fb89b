"""Strict decoding: every frame in a shard is a JPEG that all decoders accept.

One bad JPEG ends a DALI pipeline. So a correct file is kept byte for byte, another one is converted (and the
change is recorded) or rejected (with a reason).
"""

import errno
import io
import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile, ImageOps, ImagePalette

from tools.jpeg import CUT, ENDED, ORIENTATION, START, BadImage, Jpeg, decode, has_clear_exif, load, read_jpeg

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
QUALITY = 90
COPIED = "copied"
# Errors of storage that is temporarily unavailable; they say nothing about the file.
TRANSIENT = frozenset(
    {errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN}
    | {errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PNG = b"\x89PNG\r\n\x1a\n"
KINDS_OF_SAMPLES = "signed, floating-point or 32-bit samples, which are not supported"
# How files of other formats begin.
UNSUPPORTED = {
    "AVIF": rb".{4}ftyp(?=.{0,40}avi[fs])",
    "HEIC": rb".{4}ftyp(?:hei|hev|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "video": rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ",
    "HTML": rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)",
    "SVG": rb"(?:\xef\xbb\xbf)?\s*<(?:svg|.{0,1000}?<svg)",
    "Photoshop": rb"8BPS",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "Windows icon": rb"\0\0[\x01\x02]\0",
    "gzip": rb"\x1f\x8b",
    "ZIP": rb"PK\x03\x04",
    "Git LFS pointer": rb"version https://git-lfs",
}
BITS, COLORS, PALETTE, PLANES, SIGNS = 258, 262, 320, 284, 339  # tags of a TIFF

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


def open_picture(stream: io.BytesIO, max_pixels: int) -> Image.Image:
    """The picture, of which only the header is read. Raises `BadImage`, also for what Pillow misreads."""
    data = stream.getvalue()
    if not data:
        raise BadImage("empty file")
    try:
        picture = Image.open(stream, formats=FORMATS)
    except Exception as error:
        raise BadImage(_why_not_opened(data)) from error
    if picture.width * picture.height > max_pixels:
        raise BadImage(f"more than --max-pixels {max_pixels}")
    if picture.format == "BMP":
        _check_bmp(picture, data)
    if picture.format == "TIFF":
        _check_tiff(picture)
    return picture


def _check_bmp(picture: Image.Image, data: bytes) -> None:
    if picture.info.get("compression") == 2:
        raise BadImage("BMP with RLE4 coding, which Pillow misreads")
    header, bits, transparency = (int.from_bytes(data[n : n + 4], "little") for n in (14, 28, 66))
    if bits & 0xFFFF == 16 and picture.info.get("compression") == 3 and header >= 56 and transparency:
        raise BadImage("BMP with 16 bits and transparency, which Pillow misreads")


def _check_tiff(picture: Image.Image) -> None:
    separate = tag(picture, PLANES, 1) == 2
    if separate and (tag(picture, BITS, 1) > 8 or tag(picture, COLORS, 1) == 6):
        raise BadImage("TIFF with separate planes of 16 bit or YCbCr, which Pillow misreads")
    if tag(picture, SIGNS, 1) in (2, 3):
        raise BadImage(KINDS_OF_SAMPLES)
    tags: Any = picture
    colors = tags.tag_v2.get(PALETTE, ()) if picture.mode == "P" else ()
    if colors and 0 < max(colors) < 256:  # some programs write 8 of the 16 bits
        picture.palette = ImagePalette.raw("RGB;L", bytes(colors))


def without_metadata(data: bytes) -> bytes:
    """A PNG with only the chunks that its pixels need, a JPEG without an incomplete JFIF segment.

    Pillow rejects a file for damage in its metadata; other decoders do not. Orientation is kept.
    """
    if data.startswith(b"\xff\xd8\xff\xe0"):
        size = int.from_bytes(data[4:6], "big")  # libjpeg ignores a JFIF segment that is shorter
        return data[:2] + data[4 + size :] if 2 <= size < 16 else data
    if not data.startswith(PNG):
        return data
    kept, place, last = [PNG], len(PNG), b""
    while place < len(data):
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place : place + 12 + size]
        whole = zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        if name == b"IDAT" != last and any(part[4:8] == name for part in kept):
            return data  # pixels in several places are damage
        last = name
        if name[:1].isupper() or name == b"tRNS" or (name == b"eXIf" and whole):
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def tag(picture: Image.Image, number: int, default: int) -> int:
    """The first value of a tag of a TIFF."""
    tags: Any = picture
    value = tags.tag_v2.get(number, default)
    return value[0] if isinstance(value, tuple) else value


def _why_not_opened(data: bytes) -> str:
    for name, start in UNSUPPORTED.items():
        if re.match(start, data, re.DOTALL | re.IGNORECASE):
            return f"{name}, which is not supported"
    for name in FORMATS:
        accepts = Image.OPEN[name][1]
        if accepts is not None and accepts(data[:16]):
            return f"{name} that is cut off, damaged or of a kind that Pillow cannot read"
    return "not an image"


def why_not_decoded(picture: Image.Image, error: Exception) -> str:
    """The reason to reject a picture that was opened."""
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
    pixels = (np.asarray(upright) >> (tag(picture, BITS, 16) if tiff else 16) - 8).astype(np.uint8)
    return Image.fromarray(~pixels if tiff and tag(picture, COLORS, 1) == 0 else pixels)
