"""Scaling the frames of a video: planar output, which is faster, has the pixels of rgb24."""

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from tests.tools.test_pack import pixels
from tools.images import encode
from tools.streams import ACCURATE, JpegWriter

FORMATS = [
    "yuv420p",
    "yuvj420p",
    "yuv422p",
    "yuv444p",
    "yuv411p",
    "nv12",
    "yuyv422",
    "yuva420p",
    "yuv420p10le",
]


@pytest.mark.parametrize(
    "pixel_format", [*FORMATS, "p010le", "gray", "ya8", "rgb24", "bgr0", "bgra", "gbrp", "rgb565le", "rgb8"]
)
def test_frames_have_the_pixels_of_rgb24(pixel_format):
    """The bytes of packed clips are those of earlier versions."""
    for size, short_side in (((64, 48), 48), ((97, 61), 61), ((97, 61), 50), ((320, 240), 43)):
        frame = av.VideoFrame.from_image(pixels(1, size)).reformat(format=pixel_format)
        for matrix in (frame.colorspace, 1):
            frame.colorspace = matrix
            writer = JpegWriter("any", short_side)
            jpeg = writer(frame)
            whole = VideoReformatter().reformat(frame, *writer.size, "rgb24", interpolation=ACCURATE)
            assert jpeg == encode(whole.to_image())
            assert writer.changes() == ["any to JPEG"] + ["resized"] * (min(size) > short_side)


def test_a_repeated_frame_is_encoded_once():
    frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
    writer = JpegWriter("any", 32)
    assert writer(frame) is writer(frame)
    assert writer.size == (32, 32)
