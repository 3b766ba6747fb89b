"""Read a JPEG strictly: its markers, its EXIF orientation, and whether all of its pixels are there.

If coded pixels end early, libjpeg fills the picture with gray and warns. simplejpeg reports the warnings, but
cannot decode every kind of JPEG. Pillow can, but hides them. So it decodes the pixels without the end marker,
or a second time with more bytes after each piece of them.
"""

import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin

START, END = b"\xff\xd8", b"\xff\xd9"
CUT = "bytes after its end cut off"
ENDED = "missing end marker added"
# Eight bytes of ones, as libjpeg reads ahead by up to 8 bytes. No code consists of ones, so they hold at most
# two blocks of pixels.
ONES = b"\xff\x00" * 8
TAIL = 4  # bytes of coded data; if the last pixel ends before them, the decoder has lost its place
FILLER = bytes(0xA5 ^ n for n in range(64))  # libjpeg takes missing bits for zeros: these begin with a one
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
ORIENTATION = 0x0112
# libjpeg's warnings that coded pixels are damaged; with the group, that some are missing.
DAMAGE = re.compile("(premature end|found marker)|bad Huffman code", re.IGNORECASE)


class BadImage(Exception):
    """A file that cannot be packed. Its text is the reason, the same for all files with one problem.

    span, row: as in `Packed`, of the part of the source that it concerns; without, of the whole source.
    """

    def __init__(self, reason: str, span: str = "", row: dict[str, object] | None = None) -> None:
        super().__init__(reason)
        self.span, self.row = span, row or {}


@dataclass
class Jpeg:
    """A JPEG's bytes from its start marker to its end marker, and what its markers contain."""

    data: bytes = b""
    changes: list[str] = field(default_factory=list)
    scans: list[tuple[int, int]] = field(default_factory=list)  # start and end of coded pixels, bytes
    exif: list[bytes] = field(default_factory=list)  # EXIF segments
    coding: int = 0  # the marker of the frame: 0xC0 baseline, 0xC2 progressive, ...
    components: int = 0
    size: tuple[int, int] = (0, 0)  # width, height
    sampling: list[tuple[int, int]] = field(default_factory=list)  # horizontal, vertical, of each component
    names: list[int] = field(default_factory=list)  # of the components
    interval: int = 0  # units of pixels between two restart markers; 0: no restart markers
    scanned: set[int] = field(default_factory=set)  # components that have coded pixels
    in_first_scan: int = 0  # components in the first scan

    @property
    def unusual(self) -> bool:
        """True for arithmetic, lossless and hierarchical coding."""
        return self.coding > 0xC2

    @property
    def has_one_scan(self) -> bool:
        """True if one scan holds all pixels."""
        return self.coding < 0xC2 and len(self.scans) == 1 and self.in_first_scan == self.components

    @property
    def in_one_piece(self) -> bool:
        """True if the coded pixels are one sequence of bytes without any marker."""
        return self.has_one_scan and not RESTART.search(self.data, *self.scans[0])

    def source(self) -> bytes:
        """The bytes to decode: if the coded pixels are in one piece, without an end marker."""
        return self.data[: self.scans[0][1]] + ONES if self.in_one_piece else self.data

    def filled(self) -> bytes:
        """The JPEG with additional bytes before every marker that ends coded pixels. Decoders skip them."""
        parts, done = [], 0
        for start, end in self.scans:
            pieces = re.sub(rb"(?=\xff+[\xd0-\xd7])", FILLER, self.data[start:end])
            parts += [self.data[done:start], pieces, FILLER]
            done = end
        return b"".join([*parts, self.data[done:]])


def read_jpeg(data: bytes) -> Jpeg:
    """Follow the markers to the end marker; cut off what follows it. Raises `BadImage`.

    Decoders treat damaged markers differently: Pillow accepts stray bytes between the segments of a header,
    and sometimes a missing end marker; DALI accepts neither.
    """
    jpeg, end, header = Jpeg(), 0, b""  # of the scan that has not ended yet
    for marker, start, strays in _markers(data):
        if header:
            _check_restarts(jpeg, header, data, jpeg.scans[-1][0], start)
            jpeg.scans[-1], header = (jpeg.scans[-1][0], start), b""
        if strays and "stray bytes in its header left out" not in jpeg.changes:
            jpeg.changes.append("stray bytes in its header left out")
        content = start + 4
        size = max(0, int.from_bytes(data[start + 2 : content], "big") - 2)
        segment = data[content : content + size]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _read_frame(jpeg, marker, segment)
        elif marker == 0xDD:
            jpeg.interval = int.from_bytes(segment[:2], "big")
        elif marker == 0xDA and segment:
            jpeg.scanned |= {*segment[1 : 1 + 2 * segment[0] : 2]}
            jpeg.in_first_scan = jpeg.in_first_scan or segment[0]
            header = segment
            jpeg.scans.append((content + size, len(data)))
        elif marker == 0xE1 and segment.startswith(b"Exif"):
            jpeg.exif.append(segment)
        elif marker == 0xD9:
            end = start + 2
    if header:
        _check_restarts(jpeg, header, data, *jpeg.scans[-1])
    if not jpeg.scans or max(len(jpeg.scanned), jpeg.in_first_scan) < jpeg.components:
        raise BadImage("truncated")
    if end:
        jpeg.changes += [CUT] if end < len(data) else []
        jpeg.data = data[:end]
        return jpeg
    if not jpeg.has_one_scan:
        raise BadImage("truncated")
    jpeg.data = data[: jpeg.scans[-1][1]].rstrip(b"\xff")
    jpeg.scans[-1] = jpeg.scans[-1][0], len(jpeg.data)
    jpeg.data += END
    jpeg.changes.append(ENDED)
    return jpeg


def _read_frame(jpeg: Jpeg, marker: int, segment: bytes) -> None:
    """Note the kind of coding. Raises `BadImage` for a kind that libjpeg or Pillow cannot decode."""
    if len(segment) < 6:
        raise BadImage("truncated")
    bits, height, jpeg.components = segment[0], int.from_bytes(segment[1:3], "big"), segment[5]
    if bits != 8:
        raise BadImage("JPEG without 8 bits per sample, which is not supported")
    if not height:
        raise BadImage("JPEG without its height in the header, which is not supported")
    if jpeg.components not in (1, 3, 4):
        raise BadImage("JPEG without 1, 3 or 4 color components, which is not supported")
    jpeg.coding, jpeg.size = marker, (int.from_bytes(segment[3:5], "big"), height)
    jpeg.names = [*segment[6::3]]
    jpeg.sampling = [(both >> 4, both & 15) for both in segment[7::3]]
    if jpeg.unusual:
        jpeg.changes.append("unusual JPEG coding made baseline")


def _check_restarts(jpeg: Jpeg, header: bytes, data: bytes, start: int, end: int) -> None:
    """Raise `BadImage` if the scan from `start` to `end` lacks restart markers, or has them in another order.

    libjpeg then continues behind the next marker that fits, with gray or misplaced pixels.
    """
    if jpeg.unusual or not all(jpeg.size) or not all(h and v for h, v in jpeg.sampling):
        return
    wide, high = (max(sides, default=1) for sides in zip(*jpeg.sampling, strict=True))
    across, down = 8 * wide, 8 * high  # pixels of the image in one unit of coded pixels
    if header[0] == 1 and header[1] in jpeg.names:  # a unit is one block of this component
        h, v = jpeg.sampling[jpeg.names.index(header[1])]
        across, down = across / h, down / v
    units = ceil(jpeg.size[0] / across) * ceil(jpeg.size[1] / down)
    wanted = max(0, ceil(units / jpeg.interval) - 1) if jpeg.interval else 0
    found = [mark[1] & 7 for mark in RESTART.findall(data, start, end)]
    if found[:wanted] != [n % 8 for n in range(wanted)]:
        raise BadImage("truncated" if len(found) < wanted else "damaged: restart markers out of order")
    if len(found) > wanted + 1:  # some encoders write one after the last pixel
        raise BadImage("damaged: coded data is left after the last pixel")


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


# ---- pixels ------------------------------------------------------------------------------------------------


def decode(jpeg: Jpeg, picture: Image.Image, side: int) -> np.ndarray | None:
    """The pixels of `picture`, an opened `jpeg`: uint8 [height, width, 4 or 1].

    None: only Pillow can decode it. The decoder may shrink large pictures 2, 4 or 8-fold, but not below
    `side` x `side` pixels. Raises `BadImage` if libjpeg warns that pixels are damaged or missing.
    """
    if jpeg.components == 4 or jpeg.unusual:
        return None
    picture.draft(None, (side, side))  # finds the size
    colors = "GRAY" if jpeg.components == 1 else "RGBX"
    width, height = picture.size
    try:
        return simplejpeg.decode_jpeg(jpeg.data, colors, min_height=height, min_width=width)
    except ValueError as error:  # also for a sampling that it cannot decode, and for harmless warnings
        if reason := DAMAGE.search(str(error)):
            raise BadImage("truncated" if reason[1] else "damaged: it cannot be decoded") from error
    return None


def load(jpeg: Jpeg, side: int) -> Image.Image:
    """The same with Pillow, which hides libjpeg's warnings. Raises `BadImage` if pixels are missing."""
    stream = io.BytesIO(jpeg.source())
    picture = Image.open(stream, formats=["JPEG"])
    assert isinstance(picture, JpegImagePlugin.JpegImageFile)
    picture.draft(None, (side, side))
    if not jpeg.in_one_piece:
        picture.decodermaxblock = len(jpeg.data)  # arithmetic coding must be decoded in one call
        picture.load()
        if not jpeg.unusual:
            _compare(picture, jpeg, side)
        return picture
    end = jpeg.scans[0][1]
    picture.decodermaxblock = max(1, end - TAIL)
    picture.load()
    rest = jpeg.data[end - TAIL : end].replace(b"\xff\0", b"\xff")
    if stream.tell() == end - TAIL and len({*rest}) > 1:
        raise BadImage("damaged: coded data is left after the last pixel")
    return picture


def _compare(picture: Image.Image, jpeg: Jpeg, side: int) -> None:
    """Raise `BadImage` if more bytes before the markers change the pixels: then coded data ends early."""
    other = Image.open(io.BytesIO(jpeg.filled()), formats=["JPEG"])
    other.draft(None, (side, side))
    if other.tobytes() != picture.tobytes():
        raise BadImage("truncated")


# ---- orientation -------------------------------------------------------------------------------------------


def has_clear_exif(blocks: Sequence[bytes]) -> bool:
    """True if every decoder finds the same orientation in a JPEG's EXIF segments, or none."""
    if not any(tag in block for block in blocks for tag in (b"\x01\x12", b"\x12\x01")):
        return True
    one = len(blocks) == 1 and blocks[0].startswith(b"Exif\0\0")
    return one and _orientation_tags(blocks[0][6:]) in [[(3, 1, value)] for value in range(1, 9)]


def _orientation_tags(tiff: bytes) -> list[tuple[int, int, int]]:
    """(type, count, value) of each orientation tag in the first directory; [] if it is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return []
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        entries = [struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * n) for n in range(count)]
    except struct.error:
        return []
    return [(kind, number, value) for tag, kind, number, value in entries if tag == ORIENTATION]
