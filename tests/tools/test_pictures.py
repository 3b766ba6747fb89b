"""Pictures that decoders read differently: each is copied, converted or rejected as its pixels require."""

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines_fixtures import write_rows
from tests.tools.test_pack import dali_decode, encoded, exif, pack_images, pixels, rows_of, write
from tools.images import COPIED, BadImage, fitted, prepare, resized
from tools.verify import verify

ROOT = Path(__file__).resolve().parents[2]
START, END = b"\xff\xd8", b"\xff\xd9"
SQUARE = (96, 96)


def packed(data: bytes) -> tuple[np.ndarray, str, bytes]:
    """What `prepare` makes of a picture: the pixels that DALI decodes, the change and the JPEG."""
    made = prepare(data, 256, 1_000_000)
    (pictured,) = dali_decode([*made.frames])
    assert pictured.shape[:2] == made.size[::-1]
    plain = np.asarray(Image.open(io.BytesIO(made.frames[0])).convert("RGB"))
    assert distance(plain, pictured) < 6, "Pillow and DALI decode this frame differently"
    return pictured, made.change, made.frames[0]


def distance(one: np.ndarray, other: np.ndarray | Image.Image) -> float:
    other = np.asarray(other.convert("RGB") if isinstance(other, Image.Image) else other)
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other).mean()


def rejected(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        prepare(data, 256, 1_000_000)
    return str(caught.value)


# ---- orientation -------------------------------------------------------------------------------------------

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def directory(*tags: tuple[int, int, int, int], order: str = "<") -> bytes:
    """A TIFF directory at byte 0 with (tag, type, count, value) of each entry."""
    entries = []
    for tag, kind, count, value in tags:
        content = struct.pack(f"{order}H2x", value) if kind == 3 else struct.pack(f"{order}I", value)
        entries.append(struct.pack(f"{order}HHI", tag, kind, count) + content)
    return struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def exif_block(*tags: tuple[int, int, int, int], order: str = "<", start: int = 8) -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return segment(0xE1, b"Exif\0\0" + head + directory(*tags, order=order))


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return START + b"".join(segments) + jpeg[2:]


def orientation(value: int, kind: int = 3, count: int = 1) -> tuple[int, int, int, int]:
    return (0x0112, kind, count, value)


RESOLUTION = (0x0128, 3, 1, 2)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMP_BLOCK = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_every_orientation_is_applied_once(kind: str, value: int):
    image = pixels(value, (80, 60))
    told = {"tiffinfo": {0x0112: value}} if kind == "TIFF" else {"exif": exif(value)}
    upright = image.transpose(TURNS[value]) if value in TURNS else image
    found, change, jpeg = packed(encoded(image, kind, **told))
    assert distance(found, upright) < 6
    assert (change == COPIED) == (kind == "JPEG" and value == 1)
    assert change == COPIED or b"Exif" not in jpeg


UNCLEAR = {
    "two tags, the first upright": [exif_block(orientation(1), orientation(6))],
    "two tags, the second upright": [exif_block(orientation(6), orientation(1))],
    "two blocks, the first upright": [exif_block(orientation(1)), exif_block(orientation(6))],
    "two blocks, the second upright": [exif_block(orientation(6)), exif_block(orientation(1))],
    "two blocks, one without": [exif_block(RESOLUTION), exif_block(orientation(6))],
    "a wide type": [exif_block(orientation(6, kind=4))],
    "a wide type, upright": [exif_block(orientation(1, kind=4))],
    "a value of no meaning": [exif_block(orientation(9))],
    "two values": [exif_block(orientation(6, count=2))],
    "its directory at another place": [exif_block(orientation(6), start=10)],
    "its directory outside": [exif_block(orientation(6), start=10_000)],
    "in a second directory": [
        exif_block(RESOLUTION)[:-4] + struct.pack("<I", 26) + directory(orientation(6))
    ],
    "another byte order than declared": [exif_block(orientation(6)).replace(b"II*\0", b"MM\0*")],
    "a broken magic number": [exif_block(orientation(6)).replace(b"II*\0", b"II\0\0")],
    "no zeros after its name": [exif_block(orientation(6)).replace(b"Exif\0\0", b"Exif\0\xff")],
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_an_unclear_orientation_leaves_the_metadata_out(name: str):
    """Pillow and DALI disagree about some of these. Only a square picture hides it."""
    blocks = UNCLEAR[name]
    if name == "in a second directory":
        content = blocks[0][4:]
        blocks = [segment(0xE1, content)]
    for size in (SQUARE, (96, 64)):
        _, change, jpeg = packed(with_segments(encoded(pixels(1, size)), *blocks))
        assert "unclear EXIF left out" in change and b"Exif" not in jpeg


@pytest.mark.parametrize("order", ["<", ">"])
def test_clear_exif_is_kept(order: str):
    image = encoded(pixels(1, SQUARE))
    for block in (exif_block(orientation(1), order=order), exif_block(RESOLUTION, order=order)):
        data = with_segments(image, block)
        _, change, jpeg = packed(data)
        assert change == COPIED and jpeg == data
    upright = pixels(1, SQUARE).transpose(TURNS[6])
    found, _, _ = packed(with_segments(image, exif_block(RESOLUTION, orientation(6), order=order)))
    assert distance(found, upright) < 6


@pytest.mark.parametrize("kind", ["JPEG", "JPEG with EXIF", "TIFF", "PNG", "WEBP"])
def test_xmp_alone_turns_nothing(kind: str):
    image = pixels(1, (80, 60))
    if kind.startswith("JPEG"):
        blocks = [exif_block(RESOLUTION)] if "EXIF" in kind else []
        data = with_segments(encoded(image), *blocks, XMP_BLOCK)
        assert packed(data)[1:] == (COPIED, data)
    elif kind == "PNG":
        data = encoded(image, "PNG")
        text = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + XMP
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        data = data[:33] + chunk + data[33:]
    elif kind == "TIFF":
        data = encoded(image, "TIFF", tiffinfo={700: XMP})
    else:
        data = encoded(image, "WEBP", xmp=XMP)
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6, "Pillow sees no XMP"
    found, _, _ = packed(data)
    assert distance(found, image) < 6


# ---- missing pixels ----------------------------------------------------------------------------------------

WAYS = {
    "baseline": {},
    "gray": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
    "restarts per row": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "progressive gray": {"progressive": True},
    "progressive with restarts": {"progressive": True, "restart_marker_blocks": 5},
}


def made(way: str, size: tuple[int, int] = (200, 152), seed: int = 3) -> bytes:
    noisy = np.asarray(pixels(seed, size)).astype(int)
    noisy += np.random.default_rng(seed).integers(-20, 20, noisy.shape)
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return encoded(image.convert("L") if "gray" in way else image, **WAYS[way])


def scan(data: bytes) -> int:
    """Where the coded pixels of the first scan start."""
    place = data.index(b"\xff\xda")
    return place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")


@pytest.mark.parametrize("way", WAYS)
def test_complete_jpegs_are_copied(way: str):
    for side in (8, 16, 17, 33, 64, 200):
        data = made(way, (side, side + 9), side)
        assert prepare(data, 256, 1_000_000).change == COPIED
        assert packed(data)[2] == data


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("way", WAYS)
def test_coded_pixels_that_end_early_are_damage(way: str, share: float):
    """The end marker is there. libjpeg would fill the rest with gray."""
    data = made(way)
    start = scan(data)
    cut = start + int(share * (len(data) - start))
    assert rejected(data[:cut].rstrip(b"\xff") + END) == "truncated"
    assert rejected(data[:cut]) == "truncated"


@pytest.mark.parametrize("way", ["restarts", "restarts per row", "progressive", "progressive with restarts"])
def test_pixels_missing_in_the_middle_are_damage(way: str):
    data = made(way)
    marker = b"\xff\xd2" if "restarts" in way else b"\xff\xda"
    place = data.index(marker, data.index(marker, scan(data)) + 2 if marker == b"\xff\xda" else scan(data))
    place = data.rindex(b"\xff\xc4", 0, place) if marker == b"\xff\xda" else place
    assert rejected(data[: place - 6].rstrip(b"\xff") + data[place:]) == "truncated"


@pytest.mark.parametrize("end", [b"", END])
@pytest.mark.parametrize("way", ["baseline", "restarts per row", "progressive with restarts"])
def test_a_marker_between_coded_pixels_is_damage(way: str, end: bytes):
    """libjpeg continues at a later restart marker, and the last rows become gray."""
    data = made(way)
    place = (scan(data) + len(data)) // 2
    place = place + (data[place - 1] == 0xFF)
    for marker in (b"\xff\x9f\x01\x00", b"\xff\xae\xff\xff"):
        assert rejected(data[:place] + marker + data[place + 4 : -2] + end) == "truncated"


def test_restart_markers_must_be_complete_and_in_order():
    data = made("restarts")
    places = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    middle, after = places[20], places[21]
    assert rejected(data[:middle] + data[after:]) == "truncated"
    assert rejected(data[:middle] + data[places[28] :]) == "truncated"
    assert rejected(data[: places[-1]] + END) == "truncated"
    more = data[:-2] + b"\xff\xd7" + END
    assert packed(more)[1:] == (COPIED, more)
    assert rejected(data[: middle + 1] + b"\xd0" + data[middle + 2 :]) == (
        "damaged: restart markers out of order"
    )
    again = data[:-2] + data[places[-8] : -2] + END
    assert rejected(again) == "damaged: coded data is left after the last pixel"


@pytest.mark.parametrize("way", [way for way in WAYS if "progressive" not in way])
def test_a_missing_end_marker_is_added(way: str):
    data = made(way)
    for cut in (1, 2):
        _, change, jpeg = packed(data[:-cut])
        assert change == "missing end marker added" and jpeg == data


@pytest.mark.parametrize("way", [way for way in WAYS if "progressive" in way])
def test_a_progressive_jpeg_without_end_marker_may_lack_scans(way: str):
    assert rejected(made(way)[:-2]) == "truncated"


def test_coded_data_that_is_left_is_damage():
    """After a wrong bit, libjpeg reads other codes and often ends before or after the data does."""
    data = made("baseline")
    assert rejected(patched(data, (2, 120))) == "damaged: coded data is left after the last pixel"
    assert rejected(patched(data, (2, 168))) == "truncated"


@pytest.mark.parametrize(("place", "bit"), [(2893, 8), (2640, 64), (306, 8)])
def test_wrong_bits_that_libjpeg_notices_are_damage(place: int, bit: int):
    """All coded pixels are there, and Pillow hides the warning."""
    data = bytearray(made("progressive"))
    data[scan(data) + place] ^= bit
    Image.open(io.BytesIO(data)).load()
    assert rejected(bytes(data)) in ("truncated", "damaged: it cannot be decoded")


def test_filler_after_the_last_pixel_is_no_damage():
    for filler in (bytes(500), b"\xff\x00" * 500):
        data = made("baseline")[:-2] + filler + END
        assert packed(data)[1:] == (COPIED, data)


# ---- pictures that are copied, and decoded alike -----------------------------------------------------------


def frame(data: bytes) -> int:
    """Where the content of the frame header starts: bits, height, width, components."""
    return next(data.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data) + 4


def patched(data: bytes, *changes: tuple[int, int]) -> bytes:
    """The JPEG with (place after the start of the frame header, byte) changed."""
    new = bytearray(data)
    for place, value in changes:
        new[frame(data) + place] = value
    return bytes(new)


def renamed(data: bytes, names: bytes) -> bytes:
    """The JPEG with other component numbers."""
    new = bytearray(data)
    scan_header = data.index(b"\xff\xda") + 5
    for index, name in enumerate(names):
        new[frame(data) + 6 + 3 * index] = new[scan_header + 2 * index] = name
    return bytes(new)


def without_jfif(data: bytes) -> bytes:
    assert data[2:4] == b"\xff\xe0"
    return START + data[4 + int.from_bytes(data[4:6], "big") :]


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def odd() -> dict[str, bytes]:
    plain, full = made("baseline"), made("4:4:4")
    return {
        "colors without conversion": encoded(pixels(1), keep_rgb=True),
        "Adobe without conversion": with_segments(without_jfif(full), adobe(0)),
        "Adobe with conversion": with_segments(without_jfif(full), adobe(1)),
        "Adobe with an unknown conversion": with_segments(without_jfif(full), adobe(2)),
        "JFIF and Adobe disagree": full[:20] + adobe(0) + full[20:],
        "neither JFIF nor Adobe": without_jfif(full),
        "components R G B": renamed(without_jfif(full), b"RGB"),
        "components R G B with JFIF": renamed(full, b"RGB"),
        "components 0 1 2": renamed(without_jfif(full), bytes([0, 1, 2])),
        "components 34 35 36": renamed(without_jfif(full), bytes([34, 35, 36])),
        "gray with sampling 2x2": patched(made("gray"), (7, 0x22)),
        "gray with sampling 4x1": patched(made("gray"), (7, 0x41)),
        "extended sequential": plain.replace(b"\xff\xc0", b"\xff\xc1", 1),
        "a comment with markers": with_segments(plain, segment(0xFE, END + START + b"\xff\xda")),
        "a second JFIF block": with_segments(plain, plain[2:20]),
        "other pixels as thumbnail": with_segments(plain, segment(0xED, encoded(pixels(9)))),
        "fill bytes before a marker": plain[:20] + b"\xff\xff" + plain[20:],
        "fill bytes before the end": plain[:-2] + b"\xff\xff" + END,
        "zeros before the end": plain[:-2] + bytes(40) + END,
        "another picture behind": plain + encoded(pixels(9)),
        "a restart interval that is never reached": with_segments(plain, segment(0xDD, b"\xff\xff")),
        "not square pixels": plain.replace(b"\x00\x00\x01\x00\x01", b"\x00\x00\x03\x00\x01", 1),
        "one pixel": encoded(pixels(1, (1, 1))),
        "one column": encoded(pixels(1, (1, 77))),
        "one row": encoded(pixels(1, (77, 1))),
        "lowest quality": _quality(1),
        "highest quality": _quality(100),
        "CMYK": encoded(pixels(1).convert("CMYK")),
        "CMYK without Adobe": _without_adobe(encoded(pixels(1).convert("CMYK"))),
        "a color profile": encoded(pixels(1), icc_profile=bytes(3000)),
    }


def _quality(value: int) -> bytes:
    buffer = io.BytesIO()
    pixels(1).save(buffer, "JPEG", quality=value)
    return buffer.getvalue()


def _without_adobe(data: bytes) -> bytes:
    place = data.index(b"\xff\xee")
    return data[:place] + data[place + 2 + int.from_bytes(data[place + 2 : place + 4], "big") :]


@pytest.mark.parametrize("name", odd())
def test_packed_jpegs_decode_alike_in_pillow_and_dali(name: str):
    """`packed` compares them."""
    data = odd()[name]
    found, change, jpeg = packed(data)
    assert change == COPIED or jpeg != data
    if not name.startswith("CMYK"):
        assert distance(found, Image.open(io.BytesIO(data))) < 6


# ---- other formats -----------------------------------------------------------------------------------------


def tiff(image: np.ndarray, bits: int, photometric: int, planar: int = 1) -> bytes:
    """A little-endian TIFF, uncompressed, of the bytes of `image` [h, w] or [3, h, w]."""
    height, width = image.shape[-2:]
    planes = image.shape[0] if image.ndim == 3 else 1
    content = image.tobytes()
    size = len(content) // planes
    places = b"".join(struct.pack("<I", 8 + size * n) for n in range(planes))
    sizes = struct.pack("<I", size) * planes
    values = 8 + len(content)
    long = [(values, places), (values + len(places), sizes)]
    at = [place if planes > 1 else struct.unpack("<I", data)[0] for place, data in long]
    bits_at = values + 8 * planes
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, planes, bits) if planes == 1 else (258, 3, planes, bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, planes, at[0]),
        (277, 3, 1, planes),
        (278, 4, 1, height),
        (279, 4, planes, at[1]),
        (284, 3, 1, planar),
    ]
    start = bits_at + 2 * planes + (bits_at + 2 * planes) % 2
    body = (content + places + sizes + struct.pack("<H", bits) * planes).ljust(start - 8, b"\0")
    return b"II*\0" + struct.pack("<I", start) + body + directory(*tags)


GRAY = np.asarray(pixels(5, (64, 48)).convert("L"))
WIDE = GRAY.astype("<u2") * 257


def test_sixteen_bits_become_eight():
    twelve = np.asarray(GRAY, np.uint16) * 16 + 5  # 12 bits
    pairs = twelve.reshape(-1, 2)
    packed_bits = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255])
    files = {
        "PGM": b"P5 64 48 65535\n" + WIDE.astype(">u2").tobytes(),
        "PGM with 10 bits": b"P5 64 48 1023\n" + (GRAY.astype(np.uint16) * 4).astype(">u2").tobytes(),
        "PNG": encoded(Image.fromarray(WIDE.astype(np.uint16)), "PNG"),
        "TIFF": tiff(WIDE, 16, 1),
        "TIFF whose zero is white": tiff(65535 - WIDE, 16, 0),
        "TIFF with 12 bits": tiff(packed_bits.T.astype(np.uint8).reshape(48, -1), 12, 1).replace(
            struct.pack("<HHII", 256, 4, 1, 96), struct.pack("<HHII", 256, 4, 1, 64)
        ),
    }
    for name, data in files.items():
        found, change, _ = packed(data)
        assert "16 bit to 8 bit" in change, name
        assert np.abs(found[..., 0].astype(int) - GRAY).mean() < 6, name


def chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


DAMAGED_METADATA = {
    "a large text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))),
    "a wrong checksum": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(9)), crc=5),
    "a short chunk": chunk(b"pHYs", b"\0"),
    "a wrong animation": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fdAT", bytes(9)),
}


@pytest.mark.parametrize("name", DAMAGED_METADATA)
def test_damaged_metadata_of_a_png_is_left_out(name: str):
    upright = pixels(2, (80, 60))
    data = encoded(upright, "PNG", exif=exif(6))
    found, change, _ = packed(data[:33] + DAMAGED_METADATA[name] + data[33:])
    assert change.endswith("damaged metadata left out")
    assert distance(found, upright.transpose(TURNS[6])) < 6
    pixel_data = bytearray(data)
    pixel_data[data.index(b"IDAT") + 30] ^= 1
    assert rejected(bytes(pixel_data[:33] + DAMAGED_METADATA[name] + pixel_data[33:]))
    place = data.index(b"IDAT") - 4
    half, rest = data[place + 8 : place + 20], data[place + 20 : -16]
    between = chunk(b"IDAT", half) + DAMAGED_METADATA[name] + chunk(b"IDAT", rest)
    assert rejected(data[:place] + between + data[-12:])


def test_an_empty_jfif_segment_is_left_out():
    plain = without_jfif(made("baseline"))
    data = with_segments(plain, segment(0xE0, b"JFIF\0"))
    assert packed(data)[1:] == ("damaged metadata left out", plain)


def test_large_pictures_of_sixteen_bits_are_scaled():
    """Their 8-bit pixels belong to NumPy; pyarrow crashes the process if it reads them from Pillow."""
    wide = np.asarray(pixels(5, (600, 400)).convert("L")).astype(np.uint16) * 257
    made = prepare(encoded(Image.fromarray(wide), "PNG"), 256, 1_000_000)
    assert made.size == (384, 256) and made.change == "PNG to JPEG, 16 bit to 8 bit, resized"


def bmp(bits: int, compression: int, content: bytes) -> bytes:
    colors = struct.pack("<I", 0) + struct.pack("<I", 0xFFFFFF)
    head = struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, bits, compression, len(content), 0, 0, 2, 0)
    start = 14 + len(head) + len(colors)
    return b"BM" + struct.pack("<IHHI", start + len(content), 0, 0, start) + head + colors + content


def test_files_that_pillow_misreads_are_rejected():
    planes = np.stack([WIDE, WIDE // 2, WIDE // 3])
    assert rejected(tiff(planes, 16, 2, planar=2)) == (
        "TIFF with separate planes of 16 bit or YCbCr, which Pillow misreads"
    )
    found, _, _ = packed(tiff(np.stack([GRAY, GRAY // 2, GRAY // 3]), 8, 2, planar=2))
    assert np.abs(found[..., 0].astype(int) - GRAY).mean() < 6
    rows = b"\x08\x01\x00\x00" * 4 + b"\x00\x01"
    assert rejected(bmp(4, 2, rows)) == "BMP with RLE4 coding, which Pillow misreads"
    luma = np.stack([GRAY, GRAY // 2, GRAY // 3])
    assert rejected(tiff(luma, 8, 6, planar=2)) == (
        "TIFF with separate planes of 16 bit or YCbCr, which Pillow misreads"
    )


def test_signed_samples_are_rejected():
    for size, bits in ((GRAY, 8), (WIDE, 16)):
        assert rejected(with_tag(tiff(size, bits, 1), (339, 3, 1, 2))) == (
            "signed, floating-point or 32-bit samples, which are not supported"
        )
        assert packed(with_tag(tiff(size, bits, 1), (339, 3, 1, 1)))[1]


def with_tag(data: bytes, entry: tuple[int, int, int, int]) -> bytes:
    """A TIFF of `tiff` with its planes' tag (284, the last and always 1) replaced."""
    start = data.rindex(struct.pack("<HHIH", 284, 3, 1, 1))
    return data[:start] + directory(entry)[2:14] + data[start + 12 :]


@pytest.mark.parametrize("scale", [1, 257])
def test_palettes_of_tiffs_have_8_or_16_bit(scale: int):
    colors = np.stack([np.arange(256), np.arange(256) // 2, np.arange(256) // 3])
    data = tiff(GRAY, 8, 3)
    place = len(data) + len(data) % 2
    data = with_tag(data, (320, 3, 768, 0)).ljust(place, b"\0")
    at = data.rindex(struct.pack("<HHII", 320, 3, 768, 0)) + 8
    data = data[:at] + struct.pack("<I", place) + data[at + 4 :]
    found, _, _ = packed(data + (colors * scale).astype("<u2").tobytes())
    assert distance(found, colors.T[GRAY]) < 6


@pytest.mark.parametrize("transparency", [0, 0x8000])
def test_bmps_of_16_bits_have_no_transparency(transparency: int):
    masks = 0x7C00, 0x3E0, 0x1F, transparency
    head = struct.pack("<IiiHHIIiiII4I", 56, 8, 4, 1, 16, 3, 64, 0, 0, 0, 0, *masks)
    start = 14 + len(head)
    data = b"BM" + struct.pack("<IHHI", start + 64, 0, 0, start) + head + b"\xff\x7f" * 32
    if transparency:
        assert rejected(data) == "BMP with 16 bits and transparency, which Pillow misreads"
    else:
        assert packed(data)[0].min() > 250


def ftyp(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + brand + b"mif1" + bytes(100)


def test_other_formats_are_named():
    image, glass = pixels(1), pixels(1).convert("RGBA")
    files = {
        "AVIF": [
            ftyp(b"avif"),
            ftyp(b"avis"),
            struct.pack(">I", 24) + b"ftypmif1\0\0\0\0mif1avif" + bytes(99),
        ],
        "HEIC": [ftyp(b"heic"), ftyp(b"mif1")],
        "JPEG 2000": [encoded(image, "JPEG2000"), encoded(image, "JPEG2000", no_jp2=True)],
        "JPEG XL": [b"\xff\x0a" + bytes(50), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50)],
        "Photoshop": [b"8BPS\0\1" + bytes(50)],
        "SVG": [b"<svg xmlns=''/>", b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg/>'],
        "HTML": [b"<!DOCTYPE html><p><svg/>", b"\n<html>404</html>"],
        "gzip": [b"\x1f\x8b\x08" + bytes(50)],
        "ZIP": [b"PK\3\4" + bytes(50)],
        "PDF": [encoded(image, "PDF")],
        "PostScript": [encoded(image, "EPS")],
        "Windows icon": [encoded(glass, "ICO")],
        "video": [ftyp(b"isom").replace(b"mif1", b"mp42"), b"\x1aE\xdf\xa3" + bytes(50)],
        "Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
    }
    for name, many in files.items():
        for data in many:
            assert rejected(data) == f"{name}, which is not supported"
    assert rejected(bytes(4000)) == rejected(b"hello") == "not an image"


def test_a_header_that_pillow_cannot_read_is_named_by_its_format():
    png, gray = encoded(pixels(1), "PNG"), made("gray")
    unreadable = "that is cut off, damaged or of a kind that Pillow cannot read"
    assert rejected(png[:20]) == f"PNG {unreadable}"
    assert rejected(tiff(GRAY, 8, 1)[:20]) == f"TIFF {unreadable}"
    assert rejected(patched(gray, (0, 12))) == "JPEG without 8 bits per sample, which is not supported"
    assert rejected(patched(made("4:4:4"), (5, 2))) == (
        "JPEG without 1, 3 or 4 color components, which is not supported"
    )
    assert rejected(patched(gray, (1, 0), (2, 0))) == (
        "JPEG without its height in the header, which is not supported"
    )
    unknown = tiff(GRAY, 8, 1).replace(
        struct.pack("<HHIH", 259, 3, 1, 1), struct.pack("<HHIH", 259, 3, 1, 999)
    )
    assert rejected(unknown) == f"TIFF {unreadable}"
    ten = tiff(GRAY, 8, 1).replace(struct.pack("<HHIH", 258, 3, 1, 8), struct.pack("<HHIH", 258, 3, 1, 10))
    assert rejected(ten) == f"TIFF {unreadable}"
    assert rejected(bmp(8, 4, bytes(32))) == f"BMP {unreadable}"
    assert rejected(png[:16] + bytes(8) + png[24:]) == f"PNG {unreadable}"
    floats = encoded(Image.new("F", (8, 8)), "TIFF")
    assert rejected(floats) == "signed, floating-point or 32-bit samples, which are not supported"


# ---- verify ------------------------------------------------------------------------------------------------


def test_verify_compares_pixels_with_the_decoder_of_training(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Earlier versions copied a square picture with two orientations: DALI turns it, Pillow does not."""
    unclear = exif_block(orientation(6), orientation(1))
    comment = segment(0xFE, bytes(len(unclear) - 4))
    write(tmp_path / "source/a/1.jpg", with_segments(encoded(pixels(1, SQUARE)), comment))
    assert pack_images(tmp_path / "source", tmp_path / "out", val_fraction=0.0) == 0
    assert verify(tmp_path / "out") == 0
    tar = tmp_path / "out/train/000000.tar"
    data = tar.read_bytes().replace(comment, unclear)
    tar.write_bytes(data)
    (row,) = rows_of(tmp_path / "out")
    jpeg = data[row["offsets"][0] : row["offsets"][0] + row["sizes"][0]]
    row |= {"crcs": [zlib.crc32(jpeg)], "sha256": hashlib.sha256(jpeg).hexdigest()}
    write_rows(tmp_path / "out", [row])
    capsys.readouterr()
    assert verify(tmp_path / "out") == 1
    (fault,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault:")]
    assert re.search(r"frame 0 at byte 512 differs by \d+ levels between DALI and Pillow; pack", fault)


# ---- scaling -----------------------------------------------------------------------------------------------

SCALE_ON_ANY_PROCESSOR = """
import hashlib, sys
from tests.tools.test_pack import encoded, pixels
from tools.images import prepare
modes = [pixels(7, (311, 207)), pixels(8, (90, 207)).convert("L")]
print(*(hashlib.sha256(prepare(encoded(image), 50, 10**6).frames[0]).hexdigest() for image in modes))
"""


def test_scaled_pixels_do_not_depend_on_the_processor():
    """torch has code of its own for processors with AVX2."""
    found = set()
    for capability in ("default", "avx2", "avx512"):
        words = [sys.executable, "-c", SCALE_ON_ANY_PROCESSOR]
        settings = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        found.add(subprocess.run(words, env=settings, check=True, capture_output=True, cwd=ROOT).stdout)
    assert len(found) == 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (1000, 97), (97, 96)])
def test_scaled_pixels_are_pillows_within_two_levels(mode: str, size: tuple[int, int]):
    image = pixels(1, size).convert(mode)
    goal = fitted(size, 96)
    expected = np.asarray(image.resize(goal, Image.Resampling.BICUBIC)).astype(int)
    found = np.asarray(resized(image, goal).convert(mode)).astype(int)
    assert np.abs(found - expected).max() <= 2 and np.abs(found - expected).mean() < 0.1
