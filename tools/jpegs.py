"""Turn the frames of a video into JPEGs."""

from struct import unpack
from typing import Any

from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from tools.images import encode, fitted

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
HDR = {16: "HDR (PQ)", 18: "HDR (HLG)"}  # transfer functions, by the codes of H.273


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
