"""Open a picture with Pillow: its format, what Pillow misreads, and why a file is not a picture."""

import io
import re
import zlib
from typing import Any

from PIL import Image, ImagePalette

from tools.jpeg import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PNG = b"\x89PNG\r\n\x1a\n"
KINDS_OF_SAMPLES = "signed, floating-point or 32-bit samples, which are not supported"
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
BITS, COLORS, PALETTE, PLANES, SIGNS = 258, 262, 320, 284, 339  # tags of a TIFF


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
    if separate and tag(picture, BITS, 1) > 8:
        raise BadImage("TIFF with separate planes of 16 bit, which Pillow misreads")
    if separate and tag(picture, COLORS, 1) == 6:
        raise BadImage("TIFF with separate planes of YCbCr, which Pillow misreads")
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
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(data[:16]):
            try:
                factory(io.BytesIO(data), "")
            except Exception as error:
                return _header_problem(name, error.__cause__ or error)
    return "not an image"


def _header_problem(name: str, error: BaseException) -> str:
    """One short text for each kind of problem; Pillow's own texts have values of the file."""
    unknown = error.args[0] if isinstance(error, KeyError) else None
    if isinstance(unknown, tuple) or "samples per pixel" in str(error):
        return f"{name} with samples that Pillow cannot read"
    if isinstance(unknown, int) and unknown != PALETTE:
        return f"{name} with a coding that Pillow cannot read"
    if "Unsupported" in str(error):
        return f"{name} of a kind that Pillow cannot read"
    return "truncated" if "truncated" in str(error).lower() else f"{name} whose header is damaged"


def why_not_decoded(picture: Image.Image, error: Exception) -> str:
    """The reason to reject a picture that was opened."""
    if any(part in str(error).lower() for part in ("truncated", "not enough image data")):
        return "truncated"
    if picture.format == "TIFF":
        return "TIFF that is damaged or has an unsupported coding"
    return "damaged: it cannot be decoded"
