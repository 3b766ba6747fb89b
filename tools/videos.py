"""Find video files below a folder and decode them to JPEG frames at a constant rate.

Frames are chosen by their timestamps, so that videos of any frame rate, also a varying one, keep their speed.
Damaged frames are never packed: the clip ends before the damage. If less than half is left, it is rejected.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from pathlib import Path
from stat import S_ISREG
from struct import unpack
from typing import Any, TypeVar

import av
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from tools.images import BadImage, Packed, encode, fitted, mode_of
from tools.packing import walk
from tools.shards import Packing, VideoPacking

# Without playlists, scripts and streams, which open other files or the network.
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,rm,mxf,dv,nut"
PREFERRED = frozenset(
    {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".wmv", ".3gp", ".gif"}
)
# The same pixels on any processor, and colours between the coarser samples of a video's colour planes.
ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
)
TURNED = Image.Transpose
ANGLES = (None, TURNED.ROTATE_90, TURNED.ROTATE_180, TURNED.ROTATE_270)  # counterclockwise
TURNS = {  # by the signs of a display matrix: x' = a x + c y, y' = b x + d y, as (a, b, c, d)
    (0, -1, 1, 0): TURNED.ROTATE_90,
    (-1, 0, 0, -1): TURNED.ROTATE_180,
    (0, 1, -1, 0): TURNED.ROTATE_270,
    (-1, 0, 0, 1): TURNED.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): TURNED.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): TURNED.TRANSPOSE,
    (0, -1, -1, 0): TURNED.TRANSVERSE,
}
HALF = Fraction(1, 2)
TIME_STEP = Fraction(1, 1000)  # seconds; many containers round their times to it
COMPLETE = Fraction(95, 100)  # share of the declared duration from which a clip counts as complete

Name = tuple[str, int, int]  # video, start and end, seconds
T = TypeVar("T")


@dataclass
class Decoded:
    """How much of a clip was decoded; updated while its frames are read."""

    seconds: Fraction = Fraction(0)
    damaged: bool = False


def find_videos(top: Path) -> dict[Name, list[str]]:
    """The paths below `top` of all files named <video>_<start>_<end>.<anything>."""
    found: dict[Name, list[str]] = {}
    for path in walk(top):
        if named := re.fullmatch(r"(.+)_(\d+)_(\d+)", path.stem, re.ASCII):
            name = named[1], int(named[2]), int(named[3])
            found.setdefault(name, []).append(path.relative_to(top).as_posix())
    return found


def best_file(paths: Sequence[str], folders: Sequence[str]) -> str:
    """Of files with the same name, the one in the most of `folders`; videos before other files."""

    def rank(path: str) -> tuple[int, bool, str]:
        place = Path(path)
        return -len({*folders} & {*place.parts[:-1]}), place.suffix.lower() not in PREFERRED, path

    return min(paths, key=rank)


# ---- one clip --------------------------------------------------------------------------------------------


def load_video(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
    """Decode one clip to JPEGs as a `VideoPacking` requires. Raises `BadImage` or `OSError`."""
    assert isinstance(packing, VideoPacking)
    path = root / source
    if not S_ISREG(mode := mode_of(path)):
        raise BadImage("not a regular file" if mode else "no video file")
    with SourceFile(path) as file:
        try:
            packed = _decode_file(file, packing)
        except BadImage:
            if file.error is None:
                raise
        else:
            if file.error is None:
                yield packed
                return
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


def _decode_file(file: SourceFile, packing: VideoPacking) -> Packed:
    """`load_video` of an open file. Raises `BadImage`."""
    try:
        with _open(file) as container:
            return _convert(container, packing)
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


def _convert(container: InputContainer, packing: VideoPacking) -> Packed:
    stream = _picture_stream(container)
    declared = _declared(container, stream)
    if declared > Fraction(packing.max_seconds):
        raise _too_long(packing)
    decoded = Decoded()
    to_rgb = VideoReformatter()
    jpegs: list[bytes] = []
    changes = [f"{stream.codec_context.name} to JPEG"]
    goal = last = turn = size = None
    for frame in on_grid(_good_frames(container, stream, packing, decoded), Fraction(packing.fps)):
        if frame is not last:
            if goal is None:
                goal, turn = fitted((frame.width, frame.height), packing.short_side), _turn(frame)
            if (frame.width, frame.height) != goal:
                changes.append("resized")
            # For a frame of 720 lines, scaling here takes a fifth of the time that Pillow takes.
            picture = to_rgb.reformat(frame, *goal, "rgb24", interpolation=ACCURATE, threads=1).to_image()
            upright = picture.transpose(turn) if turn is not None else picture
            size = upright.size
            jpegs.append(encode(upright))
        else:
            jpegs.append(jpegs[-1])
        last = frame
    if size is None:
        raise BadImage("damaged: no frame can be decoded")
    if 2 * decoded.seconds < declared:
        raise BadImage("under half of its declared duration can be decoded")
    if turn is not None:
        changes.append("turned upright")
    if decoded.damaged:
        changes.append("damaged part left out")
    elif decoded.seconds < COMPLETE * declared:
        changes.append("shorter than it declares")
    return Packed(jpegs, size, ", ".join(dict.fromkeys(changes)))


def _picture_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is not a cover picture; it decodes in this thread."""
    streams = [
        stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise BadImage("no video stream")
    if streams[0].codec_context is None:
        raise BadImage("no decoder for its codec")
    streams[0].codec_context.thread_count = 1
    return streams[0]


def _declared(container: InputContainer, stream: VideoStream) -> Fraction:
    """Duration of the video in seconds, as the file declares it; 0 if it does not."""
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)\0*", stream.metadata.get("DURATION", ""), re.ASCII)
    if tag:  # Matroska: the duration of the file may be that of a longer sound track
        return 3600 * Fraction(tag[1]) + 60 * Fraction(tag[2]) + Fraction(tag[3])
    return Fraction(container.duration or 0, av.time_base)


def _too_long(packing: VideoPacking) -> BadImage:
    return BadImage(f"longer than --max-seconds {packing.max_seconds:g}")


def _good_frames(
    container: InputContainer, stream: VideoStream, packing: VideoPacking, decoded: Decoded
) -> Iterator[tuple[Fraction, Fraction, VideoFrame]]:
    """(start, length, frame) of all frames from the first good one up to damage; in seconds from 0."""
    step = 1 / (stream.average_rate or Fraction(30))
    base = stream.time_base or Fraction(1)
    origin, start = Fraction(0), None
    for frame in _decode(container, stream):
        if frame is None or frame.is_corrupt:
            decoded.damaged = True
            if start is None:
                continue  # a clip cut from a longer video may begin with frames that need earlier ones
            return
        if frame.width * frame.height > packing.max_pixels:
            raise BadImage(f"more than --max-pixels {packing.max_pixels}")
        time = None if frame.pts is None else frame.pts * base
        if start is None:
            origin, start = time or Fraction(0), Fraction(0)
        else:  # if a time is missing or runs backwards, the frame starts one frame later
            start = time - origin if time is not None and time - origin > start else start + step
        length = frame.duration * base or step
        decoded.seconds = start + length
        if decoded.seconds > Fraction(packing.max_seconds):
            raise _too_long(packing)
        yield start, length, frame


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | None]:
    """All frames of the stream in order; None for a part that cannot be read or decoded."""
    packets = container.demux(stream)
    while True:
        try:
            for packet in packets:
                yield from packet.decode()
            return
        except av.FFmpegError:
            with suppress(av.FFmpegError):
                yield from stream.decode()  # earlier frames that the decoder still holds
            stream.codec_context.flush_buffers()
            yield None


def on_grid(timed: Iterable[tuple[Fraction, Fraction, T]], fps: Fraction) -> Iterator[T]:
    """The item at each tick of `fps` per second: the last one that started, or the next if it is nearer.

    `timed`: (start, length, item) in order of start, the first at 0. An item that starts half a tick or more
    after the tick is not used. Ticks end within half a tick of the last item's end; there is at least one.
    """
    tick = 0
    half = HALF / fps
    before = None
    for start, length, item in timed:
        if before is not None:
            switch = max((before[0] + start) / 2, start - half) + TIME_STEP
            while tick <= switch * fps:
                yield before[1]
                tick += 1
        before = start, item, start + length
    while before is not None and (tick == 0 or tick + HALF <= before[2] * fps):
        yield before[1]
        tick += 1


def _turn(frame: VideoFrame) -> Image.Transpose | None:
    """The transpose that turns the frame upright, from its display matrix; None if it is upright."""
    try:
        data: Any = frame.side_data
        found = [bytes(item) for item in data if item.type is Type.DISPLAYMATRIX]
    except ValueError:  # PyAV has no name for some other side data, such as EXIF
        return ANGLES[round(frame.rotation / 90) % 4]
    if not found:
        return None
    matrix = unpack("9i", found[0])
    parts = matrix[0], matrix[1], matrix[3], matrix[4]
    largest = max(map(abs, parts)) or 1
    return TURNS.get(tuple(round(part / largest) for part in parts))
