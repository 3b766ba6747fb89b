"""The DALI graph from JPEG bytes to uint8 frames: the same code for images and clips, CPU and GPU.

A clip goes through flat, as its frames: the batch of a graph is samples x frames. Every frame is fed its
window and flip from outside, and the frames of a clip are fed the same, so that no operator needs to
know of clips and nothing random happens inside the graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

# name -> (filter, antialias); "triangular" is what torchvision and Pillow call bilinear.
INTERPOLATIONS = {
    "triangular": (types.DALIInterpType.INTERP_LINEAR, True),
    "linear": (types.DALIInterpType.INTERP_LINEAR, False),
    "cubic": (types.DALIInterpType.INTERP_CUBIC, True),
}


@dataclass(frozen=True)
class Feed:
    """What the graph is fed for one batch of n frames."""

    jpegs: list[np.ndarray]  # n x uint8 [bytes]
    windows: np.ndarray  # [n, 4] int32: x, y, width, height in pixels
    flips: np.ndarray  # [n] bool: mirror left to right


def frame_graph(
    jpegs: DataNode, anchors: DataNode, shapes: DataNode, sizes: DataNode, interpolation: str, gpu: bool
) -> DataNode:
    """Decode a window of each JPEG and bring it to `sizes` (height, width; a negative one mirrors)."""
    # Only the window is decoded. Fancy upsampling makes the GPU's chroma equal the CPU's.
    pixels = fn.decoders.image_slice(
        jpegs, anchors, shapes, device="mixed" if gpu else "cpu", jpeg_fancy_upsampling=True
    )
    kind, antialias = INTERPOLATIONS[interpolation]
    resized = fn.resize(pixels, size=sizes, interp_type=kind, antialias=antialias)
    assert isinstance(resized, DataNode)
    return resized


def build_pipeline(
    source: Callable[[int], Feed],
    *,
    batch: int,
    size: int,
    interpolation: str,
    device: torch.device,
    threads: int,
    prefetch: int = 2,
) -> Pipeline:
    """A pipeline whose i-th run gives the frames of `source(i)`, uint8 [batch, size, size, 3].

    The arrays in `Feed.jpegs` are read where they lie and must stay valid (memory-mapped tars do).
    """
    gpu = device.type == "cuda"

    def feed(info: types.BatchInfo) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        parts = source(info.iteration)
        sizes = np.full((batch, 2), size, np.float32)
        sizes[parts.flips, 1] *= -1
        anchors, shapes = np.split(np.ascontiguousarray(parts.windows, np.int32), 2, axis=1)
        return parts.jpegs, anchors.copy(), shapes.copy(), sizes

    gpu_id = (device.index or 0) if gpu else None
    pipeline = Pipeline(batch, threads, gpu_id, prefetch_queue_depth=prefetch)
    with pipeline:
        inputs = fn.external_source(source=feed, num_outputs=4, batch=True, batch_info=True)
        pipeline.set_outputs(frame_graph(*inputs, interpolation=interpolation, gpu=gpu))
    pipeline.build()
    return pipeline


def run(pipeline: Pipeline, device: torch.device) -> torch.Tensor:
    """The next batch, uint8 [n, size, size, 3], handed over without a copy.

    The tensor owns its memory: later runs leave it alone. On a GPU it is ordered after, and given back
    before, the work on the current stream.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    (frames,) = pipeline.run(stream)
    return torch.from_dlpack(frames.as_tensor())
