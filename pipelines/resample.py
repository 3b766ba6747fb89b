"""Resampling on the CPU: windows of decoded frames brought to one size by torch's uint8 kernels.

Measured per core: these make 7,500-10,000 frames of 224 x 224 a second, DALI's CPU resize about 1,000.
"""

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

# The kernels that F.interpolate calls, written to memory that is there already: the allocation of each
# result would cost more than the resampling.
KERNELS = {
    "triangular": torch.ops.aten._upsample_bilinear2d_aa.out,
    "linear": torch.ops.aten.upsample_bilinear2d.out,
    "cubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
SERIAL = 32_768  # elements below which a torch operation stays on its thread

Frames = Sequence[np.ndarray]
# n frames uint8 [h, w, 3], windows [n, copies, 4], flips [n, copies]
# -> uint8 [samples * copies, clip, size, size, 3]
Resample = Callable[[Frames, np.ndarray, np.ndarray], torch.Tensor]


def start_resample(threads: int, kind: str, shape: tuple[int, ...]) -> Resample:
    """A resampling that splits its frames over `threads` threads; torch's kernels release the GIL.

    shape: samples, copies, clip, size, size, 3.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="resample")
    take = recycled(shape)

    def work(frames: Frames, windows: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        out = take()
        slots = [slot for sample in out.transpose(1, 2) for slot in sample]
        parts = [slice(start, None, threads) for start in range(threads)]
        columns = ([column[part] for part in parts] for column in (frames, windows, flips, slots))
        list(pool.map(resample, *columns, [kind] * threads))
        return out.flatten(0, 1)

    return work


def recycled(shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """A source of uint8 tensors whose memory comes back to it once nothing refers to them any more.

    Fresh memory costs a page fault for every 4 KiB, in all as much as the resampling.
    """
    free: list[np.ndarray] = []

    def take() -> torch.Tensor:
        memory = free.pop() if free else np.empty(shape, np.uint8)
        view = memory.view()  # what the tensor, and every view of it, keeps alive
        weakref.finalize(view, free.append, memory)
        return torch.from_numpy(view)

    return take


def resample(
    frames: Frames, windows: np.ndarray, flips: np.ndarray, results: Sequence[torch.Tensor], kind: str
) -> None:
    """Fill n results, uint8 [copies, H, W, 3], with windows [n, copies, 4] of n frames, uint8 [h, w, 3]."""
    for frame, boxes, mirrored, copies in zip(frames, windows.tolist(), flips.tolist(), results, strict=True):
        for (x, y, w, h), flip, result in zip(boxes, mirrored, copies, strict=True):
            # numpy cuts and copies on this thread, where torch would start its own.
            window = frame[y : y + h, x : x + w]
            if window.shape == result.shape:
                np.copyto(result.numpy(), window)
            else:
                fit(torch.from_numpy(np.ascontiguousarray(window)), result, kind)
            if flip:
                mirror(result)


def fit(window: torch.Tensor, result: torch.Tensor, kind: str) -> None:
    """Resample uint8 [h, w, 3] into `result`, uint8 [H, W, 3]."""
    planes, out = window.permute(2, 0, 1)[None], result.permute(2, 0, 1)[None]
    KERNELS[kind](planes, list(result.shape[:2]), False, None, None, out=out)


def mirror(frame: torch.Tensor) -> None:
    """Mirror a frame [H, W, 3] left to right in place, in strips too small to start torch's own threads."""
    for strip in frame.split(max(1, SERIAL // (3 * frame.shape[1]) - 1)):
        strip.copy_(strip.flip(1))
