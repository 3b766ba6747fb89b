"""The DALI graph from JPEG bytes to uint8 frames: one code for images and clips, CPU and GPU.

A clip goes through flat, as its frames: the batch of a graph is samples x frames. Every frame is fed its
window and flip from outside, and the frames of a clip are fed the same ones, so that no operator needs to
know of clips and nothing random happens inside.

On a GPU the graph decodes whole pictures, cuts and resamples. On a CPU it decodes the windows alone, which
costs less and gives the same pixels, and torch resamples (`resample.py`), because DALI's CPU resize is five
times slower than torch's and would be the bottleneck.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from pipelines.machine import load_own_nvjpeg
from pipelines.resample import Resample, start_resample

load_own_nvjpeg()  # here, because torchvision is imported later

# name -> (filter, antialias); "triangular" is what torchvision and Pillow call bilinear.
FILTERS = {
    "triangular": (types.DALIInterpType.INTERP_LINEAR, True),
    "linear": (types.DALIInterpType.INTERP_LINEAR, False),
    "cubic": (types.DALIInterpType.INTERP_CUBIC, True),
}


PADDING = 2 << 20  # bytes of each decoder buffer: holds a picture of 0.7 megapixels, larger ones make it grow


@dataclass(frozen=True)
class Feed:
    """What the graph is fed for n frames, each to come out `copies` times."""

    jpegs: list[np.ndarray]  # n x uint8 [bytes]
    boxes: np.ndarray  # [n, 4] int32: x, y, width, height of what the copies need, in pixels
    windows: np.ndarray  # [n, copies, 4] int32: x, y, width, height of each copy within its box
    flips: np.ndarray  # [n, copies] bool: mirror left to right


@dataclass(frozen=True)
class Settings:
    """How a graph is built; `prefetch` and what follows change its speed, not its output."""

    samples: int
    clip: int  # frames per sample
    copies: int  # rows that each decoded sample fills
    size: int  # side of the square output, pixels
    interpolation: str  # a key of FILTERS
    device: torch.device
    threads: int
    prefetch: int = 2
    hw_decoder_load: float = 0.65  # share of the JPEGs for the GPU's decoding engines
    resize_on_cpu: bool = False  # resample inside the graph without a GPU too: for tests and comparisons
    decode: str = "whole"  # where the graph resamples: "whole" pictures, or only each "window"

    @property
    def frames(self) -> int:
        return self.samples * self.clip

    @property
    def resizes(self) -> bool:
        """Whether the graph itself resamples."""
        return self.device.type == "cuda" or self.resize_on_cpu

    @property
    def decodes_whole(self) -> bool:
        """Whether the graph decodes whole pictures, and then cuts the windows."""
        return self.resizes and self.decode == "whole"


def build_pipeline(source: Callable[[int], Feed], settings: Settings) -> Pipeline:
    """A pipeline whose i-th run works on `source(i)`, until that raises StopIteration.

    It gives uint8 frames: per copy [frames, size, size, 3], or where torch resamples the decoded boxes.
    """
    copies, whole = settings.copies if settings.resizes else 0, settings.decodes_whole
    # Inputs per copy: a size, of which a negative width mirrors, and a window unless it takes all decoded.
    step = 3 if copies > 1 or whole else 1

    def feed(info: types.BatchInfo) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        parts = source(info.iteration)
        inputs = [parts.jpegs, *(() if whole else corners(parts.boxes))]
        for copy in range(copies):
            window, sizes = parts.windows[:, copy], np.full((settings.frames, 2), settings.size, np.float32)
            sizes[parts.flips[:, copy], 1] *= -1
            window = window + parts.boxes * (1, 1, 0, 0) if whole else window
            inputs += [*(corners(window.astype(np.int32)) if step == 3 else ()), sizes]
        return tuple(inputs)

    kind, antialias = FILTERS[settings.interpolation]
    pipeline = Pipeline(
        settings.frames, settings.threads, gpu_index(settings.device), prefetch_queue_depth=settings.prefetch
    )
    with pipeline:
        count = 1 if whole else 3
        fed = fn.external_source(source=feed, num_outputs=count + step * copies, batch=True, batch_info=True)
        rest = fed[count:]
        # The paddings are of every thread; fancy upsampling makes the GPU's chroma equal the CPU's.
        pixels = (fn.decoders.image if whole else fn.decoders.image_slice)(
            *fed[:count],
            device="mixed" if settings.device.type == "cuda" else "cpu",
            jpeg_fancy_upsampling=True,
            hw_decoder_load=settings.hw_decoder_load,
            device_memory_padding=PADDING,
            host_memory_padding=PADDING,
        )
        outputs: list[object] = [] if copies else [pixels]
        for first in range(0, len(rest), step):
            *window, size = rest[first : first + step]
            part = pixels
            if window:
                part = fn.slice(pixels, start=window[0], shape=window[1], axis_names="WH")
            outputs.append(fn.resize(part, size=size, interp_type=kind, antialias=antialias))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def gpu_index(device: torch.device) -> int | None:
    """The device's number for DALI; None stands for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def corners(rectangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, 4] rectangles -> start (x, y) [n, 2] and shape (width, height) [n, 2], each contiguous."""
    return rectangles[:, :2].copy(), rectangles[:, 2:].copy()


def run(
    pipeline: Pipeline, settings: Settings, fed: Sequence[tuple[object, Feed]], resampling: Resample
) -> torch.Tensor:
    """The next batch, uint8 [samples * copies, clip, size, size, 3]; fed[0][1] is what was fed for it.

    The tensor owns its memory: later runs leave it alone. On a GPU it is ordered after, and its memory
    is given back after, the work on the current stream.
    """
    gpu = settings.device.type == "cuda"
    outputs = pipeline.run(torch.cuda.current_stream(settings.device) if gpu else None)
    if settings.resizes:
        copies = [torch.from_dlpack(out.as_tensor()).unflatten(0, (-1, settings.clip)) for out in outputs]
        return copies[0] if len(copies) == 1 else torch.stack(copies, dim=1).flatten(0, 1)
    feed = fed[0][1]
    if settings.copies == 1 and (feed.boxes[:, 2:] == settings.size).all() and not feed.flips.any():
        return torch.from_dlpack(outputs[0].as_tensor()).unflatten(0, (-1, settings.clip))
    boxes = [np.asarray(outputs[0][index]) for index in range(settings.frames)]
    return resampling(boxes, feed.windows, feed.flips)


def start_resampling(settings: Settings) -> Resample:
    """What `run` resamples with where the graph does not."""
    shape = (settings.samples, settings.copies, settings.clip, settings.size, settings.size, 3)
    return start_resample(settings.threads, settings.interpolation, shape)
