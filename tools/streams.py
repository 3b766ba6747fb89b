"""Frames of a video stream: with their times, without those that are damaged, as JPEGs."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from struct import unpack
from typing import Any

import av
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from tools.images import BadImage, encode, fitted
from tools.shards import VideoPacking

# Without times and duration. FFmpeg guesses the duration from the size, and some of the times wrongly.
RAW = ("mpegvideo", "h264", "hevc")
AHEAD = 4  # frames whose times may be permuted: packed AVI files store them out of order

# The same pixels on any processor, and colors between the coarser samples of a video's color planes.
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
HDR = {16: "HDR (PQ)", 18: "HDR (HLG)"}  # transfer functions, by the codes of H.273

Shot = tuple[Fraction, Fraction, VideoFrame]  # start and length in seconds, frame


@dataclass
class Run:
    """Frames in a row without damage; updated while they are read."""

    after: Fraction | None = None  # begin with a key frame that starts here or later, seconds
    tick: int = 0  # tick of the first frame
    seconds: Fraction = Fraction(0)  # end of the last frame
    damaged: bool = False  # damage came before or after it
    over: bool = False  # no frames follow


def picture_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    """The main video stream: default, then largest; no cover pictures. It decodes in this thread."""
    streams = [
        stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise BadImage("no video stream")

    def rank(stream: VideoStream) -> tuple[bool, bool, bool, int]:
        codec = stream.codec_context
        default = bool(stream.disposition & Disposition.default)
        return codec is not None, stream.frames != 1, default, stream.width * stream.height if codec else 0

    best = max(streams, key=rank)
    if best.codec_context is None:
        raise BadImage("no decoder for its codec")
    best.codec_context.thread_count = 1
    if best.width * best.height > max_pixels:
        raise BadImage(f"more than --max-pixels {max_pixels}")
    return best


def declared_seconds(container: InputContainer, stream: VideoStream) -> Fraction:
    """Duration of the stream in seconds, as the file declares it; 0 if it does not."""
    if container.format.name in RAW:
        return Fraction(0)
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)\0*", stream.metadata.get("DURATION", ""), re.ASCII)
    if tag:
        return 3600 * Fraction(tag[1]) + 60 * Fraction(tag[2]) + Fraction(tag[3])
    if len(container.streams) > 1:  # the duration of the file may be that of its sound
        return Fraction(0)
    return Fraction(container.duration or 0, av.time_base)


def timed_frames(
    container: InputContainer, stream: VideoStream, packing: VideoPacking
) -> Iterator[Shot | None]:
    """All frames in order, with start and length in seconds, the first at 0; None for damage."""
    raw = container.format.name in RAW
    rate = stream.codec_context.framerate if raw else stream.average_rate
    step = 1 / (rate or Fraction(30))
    base, longest = stream.time_base or Fraction(1), Fraction(packing.max_seconds)
    origin, start = Fraction(0), None
    for pts, frame in _in_sequence(_decode(container, stream)):
        if frame is None or frame.is_corrupt:
            yield None
            continue
        if frame.width * frame.height > packing.max_pixels:
            raise BadImage(f"more than --max-pixels {packing.max_pixels}")
        time = None if pts is None or raw else pts * base
        if start is None:
            origin, start = time or Fraction(0), Fraction(0)
        else:  # if a time is missing or runs backwards, the frame starts one frame later
            before = start
            start = time - origin if time is not None and time - origin > start else start + step
            if start - before > longest:
                yield None
        length = frame.duration * base or step
        yield start, length if length <= longest else step, frame


def good_run(shots: Iterator[Shot | None], fps: Fraction, run: Run) -> Iterator[Shot]:
    """The next frames up to damage; their starts are relative to the time of `run.tick`."""
    begun, origin = False, Fraction(0)
    for shot in shots:
        if shot is None:
            run.damaged = True
            if begun:
                return
            continue  # a clip cut from a longer video may begin with frames that need earlier ones
        start, length, frame = shot
        if not begun:
            if run.after is not None and (start < run.after or not frame.key_frame):
                continue
            begun, run.tick = True, round(start * fps)
            origin = run.tick / fps
        run.seconds = start + length
        yield start - origin, length, frame
    run.over = True


def _in_sequence(frames: Iterator[VideoFrame | None]) -> Iterator[tuple[int | None, VideoFrame | None]]:
    """Frames with their times (pts). If times of neighbors are permuted, they are sorted."""
    ahead: list[tuple[int | None, VideoFrame]] = []
    last = None

    def first() -> tuple[int | None, VideoFrame]:
        nonlocal last
        pts, frame = ahead.pop(0)
        later = [time for time, _ in ahead if time is not None and (last is None or time > last)]
        if pts is not None and later and min(later) < pts:
            n = next(n for n, (time, _) in enumerate(ahead) if time == min(later))
            pts, ahead[n] = min(later), (pts, ahead[n][1])
        last = pts
        return pts, frame

    for frame in frames:
        if frame is None:
            while ahead:
                yield first()
            yield None, None
        else:
            ahead.append((frame.pts, frame))
            if len(ahead) >= AHEAD:
                yield first()
    while ahead:
        yield first()


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


# ---- JPEGs -------------------------------------------------------------------------------------------------


class JpegWriter:
    """Scales the frames of a video, turns them upright and encodes them; notes what it changes."""

    def __init__(self, codec: str, short_side: int) -> None:
        self.codec, self.short_side = codec, short_side
        self.reformatter = VideoReformatter()
        self.goal: tuple[int, int] | None = None  # width, height; as those of the first frame
        self.first = self.size = (0, 0)  # those of the first frame and of the JPEGs
        self.last: VideoFrame | None = None
        self.turn: Image.Transpose | None = None
        self.jpeg, self.hdr = b"", ""
        self.resized = self.varied = False

    def __call__(self, frame: VideoFrame) -> bytes:
        if frame is self.last:
            return self.jpeg
        size = frame.width, frame.height
        if self.goal is None:
            self.goal, self.first, self.turn = fitted(size, self.short_side), size, _turn(frame)
            self.hdr = HDR.get(frame.color_trc, "")
        self.resized = self.resized or size != self.goal
        self.varied = self.varied or size != self.first
        picture = self._scaled(frame, self.goal)
        upright = picture.transpose(self.turn) if self.turn is not None else picture
        self.size, self.last, self.jpeg = upright.size, frame, encode(upright)
        return self.jpeg

    def _scaled(self, frame: VideoFrame, goal: tuple[int, int]) -> Image.Image:
        """The frame as RGB, scaled to `goal` (width, height).

        FFmpeg scales a frame of 720 lines in a fifth of the time that Pillow takes. From YUV, its planar
        output has the same pixels as rgb24 and takes a third of the time. From some RGB formats, it differs.
        """
        planar = not frame.format.is_rgb and not frame.format.has_palette
        pixels = "gbrp" if planar else "rgb24"
        scaled = self.reformatter.reformat(frame, *goal, pixels, interpolation=ACCURATE, threads=1)
        if not planar:
            return scaled.to_image()
        green, blue, red = (
            Image.frombuffer("L", goal, bytes(plane), "raw", "L", plane.line_size, 1)
            for plane in scaled.planes
        )
        return Image.merge("RGB", (red, green, blue))

    def changes(self) -> list[str]:
        """What was changed in the frames so far."""
        changes = [f"{self.codec} to JPEG"]
        if self.resized:
            changes.append("resized")
        if self.turn is not None:
            changes.append("turned upright")
        if self.varied:
            changes.append("frames of several sizes")
        return changes + ([f"{self.hdr} without tone mapping"] if self.hdr else [])


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
