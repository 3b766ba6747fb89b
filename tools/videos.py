"""Decode video files to JPEG frames at a constant rate.

Frames are chosen by their timestamps, so that videos of any frame rate, also a varying one, keep their speed.
Damaged frames are never packed: the clip ends before the damage. If less than half is left, it is rejected.
Videos longer than --max-seconds are cut into clips of equal length.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from io import FileIO
from itertools import chain
from math import ceil
from pathlib import Path
from stat import S_ISREG

import av
from av.container import InputContainer

from tools.clips import on_grid, part_length, parts_of
from tools.images import BadImage, Packed, mode_of
from tools.shards import Packing, VideoPacking
from tools.sources import Part
from tools.streams import JpegWriter, Run, Shot, declared_seconds, good_run, picture_stream, timed_frames

# Without playlists, scripts and streams, which open other files or the network.
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,rm,mxf,dv,nut,mpegvideo,h264,hevc"
SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".divx", ".ts", ".mts"}
    | {".m2ts", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".flv", ".wmv", ".asf", ".ogv", ".ogg"}
    | {".gif", ".rm", ".rmvb", ".mxf", ".dv", ".nut", ".h264", ".264", ".h265", ".265", ".hevc"}
)
LOST = "damaged: no frame can be decoded"
COMPLETE = Fraction(95, 100)  # share of the declared duration from which a clip counts as complete


@dataclass
class Piece:
    """Frames of a video that become one clip; all of them if the video is not cut."""

    index: int
    first: int  # frame of the grid at which it begins
    end: int | None  # frame past its last, if it is complete; None for an uncut video
    jpegs: list[bytes] = field(default_factory=list)
    seconds: Fraction = Fraction(0)  # of an uncut video: end of its last frame
    damaged: bool = False
    last: bool = False  # the video ends in it

    @classmethod
    def number(cls, index: int, length: Fraction | None) -> "Piece":
        """An empty piece; `length` in frames, not always a whole number."""
        return cls(index, round(index * (length or 0)), round((index + 1) * length) if length else None)

    def split(self, length: Fraction) -> "list[Piece]":
        """Its frames in pieces of `length`; the last one may be incomplete."""
        pieces = [Piece.number(n, length) for n in range(ceil(len(self.jpegs) / length))]
        for piece in pieces:
            piece.jpegs = self.jpegs[piece.first : piece.end]
        pieces[0].damaged = self.damaged
        return pieces


# ---- one clip --------------------------------------------------------------------------------------------


def load_video(root: Path, source: str, packing: Packing) -> Iterator[Part]:
    """Decode a video to JPEGs as a `VideoPacking` requires. Raises `BadImage` or `OSError`."""
    assert isinstance(packing, VideoPacking)
    path = root / source
    if not S_ISREG(mode := mode_of(path)):
        raise BadImage("not a regular file" if mode else "no video file")
    with SourceFile(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise BadImage("empty file")
        try:
            for part in _decode_file(file, packing):
                if file.error is not None:
                    break
                yield part
        except BadImage:
            if file.error is None:
                raise
        if file.error is not None:
            raise file.error


class SourceFile(FileIO):
    """A file for FFmpeg that keeps a read error. FFmpeg takes it for damage or for the end of the file."""

    error: OSError | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return b"" if self.error else os.read(self.fileno(), max(0, size or 0))
        except OSError as error:
            self.error = error
            return b""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a damaged file may make FFmpeg seek to impossible positions
                self.error = error
            return -1


def _decode_file(file: SourceFile, packing: VideoPacking) -> Iterator[Part]:
    """`load_video` of an open file. Raises `BadImage`."""
    try:
        with _open(file) as container:
            yield from _convert(container, packing)
    except BadImage:
        raise
    except Exception as error:
        # FFmpeg calls the absurd size of a damaged file out of memory; Python means the machine's memory.
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        raise BadImage("damaged: it cannot be decoded") from error


def _open(file: SourceFile) -> InputContainer:
    allowed = {"format_whitelist": FORMATS}
    try:
        return av.open(file, "r", metadata_errors="ignore", container_options=allowed)
    except av.FFmpegError as error:
        raise BadImage("not a video, or its header is damaged or missing") from error


def _convert(container: InputContainer, packing: VideoPacking) -> Iterator[Part]:
    """The video as one clip, or a long one as several. Raises `BadImage`."""
    stream = picture_stream(container, packing.max_pixels)
    declared, fps = declared_seconds(container, stream), Fraction(packing.fps)
    to_jpeg = JpegWriter(stream.codec_context.name, packing.short_side)
    pieces = _joined(_pieces(timed_frames(container, stream, packing), declared, packing, to_jpeg))
    first = next(pieces, None)
    if first is None:
        raise BadImage(LOST)
    if first.end is None:
        yield _packed(first, first.seconds, declared, to_jpeg)
    else:
        yield from parts_of(_judged(chain([first], pieces), declared * fps, to_jpeg, fps), packing.fps)


def _pieces(
    shots: Iterator[Shot | None], declared: Fraction, packing: VideoPacking, to_jpeg: JpegWriter
) -> Iterator[Piece]:
    """A video's frames in pieces of equal length; in one piece if it is not longer than --max-seconds.

    After damage, a long video continues with the first key frame of a later piece.
    """
    fps, longest = Fraction(packing.fps), Fraction(packing.max_seconds)
    length = part_length(declared, packing)
    most = (
        ceil(max(longest, declared) * fps) + 1
    )  # frames of one piece; more if a video is longer than declared
    piece, run = Piece.number(0, length), Run()
    while not run.over:
        run = Run(piece.first / fps if piece.index else None)
        for offset, frame in enumerate(on_grid(good_run(shots, fps, run), fps)):
            if length is None and len(piece.jpegs) == most:
                length = min(longest, Fraction(packing.clip_seconds)) * fps
                *whole, piece = piece.split(length)
                yield from whole
            while piece.end is not None and length and run.tick + offset >= piece.end:
                if piece.jpegs:
                    yield piece
                piece = Piece.number(piece.index + 1, length)
            if offset == 0:
                piece.damaged = run.damaged or run.tick > piece.first
                run.damaged = False
            piece.jpegs.append(to_jpeg(frame))
        piece.seconds, piece.damaged = run.seconds, piece.damaged or run.damaged
        piece.last = not run.damaged
        if piece.jpegs:
            yield piece
        if length is None:
            return
        piece = Piece.number(piece.index + 1, length)


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces; if the last one is shorter than half a piece, it is added to the one before."""
    held = None
    for piece in pieces:
        short = piece.end is not None and 2 * len(piece.jpegs) < piece.end - piece.first
        if held and short and piece.last and not held.damaged | piece.damaged:
            piece = replace(held, jpegs=held.jpegs + piece.jpegs, end=piece.end, last=True)
        elif held:
            yield held
        held = piece
    if held:
        yield held


def _judged(
    pieces: Iterable[Piece], declared: Fraction, to_jpeg: JpegWriter, fps: Fraction
) -> Iterator[tuple[int, int, Part]]:
    """(first frame, frame past the last, part) of a long video of `declared` frames; 0: unknown."""
    end = size = 0
    for piece in pieces:
        assert piece.end is not None
        if piece.first > end:
            yield end, piece.first, BadImage(LOST)
        size = piece.end - piece.first
        end = piece.first + len(piece.jpegs) if piece.last and not piece.damaged else piece.end
        wanted = min(Fraction(piece.end), declared or Fraction(end)) - piece.first
        try:
            part = _packed(piece, len(piece.jpegs) / fps, wanted / fps, to_jpeg)
        except BadImage as error:
            part = error
        yield piece.first, end, part
    if 2 * (declared - end) > size:
        yield end, round(declared), BadImage(LOST)


def _packed(piece: Piece, seconds: Fraction, declared: Fraction, to_jpeg: JpegWriter) -> Packed:
    """The sample of a piece, of which `seconds` were decoded. Raises `BadImage` if that is under half."""
    if 2 * seconds < declared:
        raise BadImage("less than half of its declared duration can be decoded")
    changes = to_jpeg.changes()
    if piece.damaged:
        changes.append("damaged part left out")
    elif seconds < COMPLETE * declared:
        changes.append("shorter than it declares")
    return Packed(piece.jpegs, to_jpeg.size, ", ".join(changes))
