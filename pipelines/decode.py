"""JPEG bytes -> uint8 frames with DALI: one graph for images and clips, CPU and GPU.

DALI decodes the frames of a clip separately: its batch is samples x frames. Every frame is fed with its crop
and flip, and the frames of a clip with the same ones. No operator knows of clips, and DALI draws nothing.

On a GPU the graph decodes whole pictures, crops and resizes them. On a CPU it decodes only the crops, which
is faster and gives the same pixels, and torch resizes them: per core, torch makes 7,500-10,000 frames of
224 x 224 a second, DALI's CPU resize about 1,000.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipelines.config import DataConfig, DecodeConfig
from pipelines.dataset import Dataset
from pipelines.errors import UserError, cause, of_machine
from pipelines.machine import load_own_nvjpeg
from pipelines.views import Rows

load_own_nvjpeg()  # before an import of torchvision
CPU = torch.device("cpu")

# name -> (DALI's filter, antialias, torch's kernel); torchvision and Pillow call "triangular" bilinear.
# F.interpolate calls the same kernels, but allocating each result would take longer than resizing.
FILTERS: dict[str, tuple[Any, bool, Any]] = {
    "triangular": (types.DALIInterpType.INTERP_LINEAR, True, torch.ops.aten._upsample_bilinear2d_aa.out),
    "linear": (types.DALIInterpType.INTERP_LINEAR, False, torch.ops.aten.upsample_bilinear2d.out),
    "cubic": (types.DALIInterpType.INTERP_CUBIC, True, torch.ops.aten._upsample_bicubic2d_aa.out),
}
PADDING = 2 << 20  # bytes of each decoder buffer: holds a picture of 0.7 megapixels, larger ones make it grow
SERIAL = 32_768  # elements below which a torch operation stays on its thread

Jpegs = list[np.ndarray]  # uint8 [bytes] each


class Encoded(NamedTuple):
    """The n = samples x T frames of a batch before they are decoded, each for `copies` rows."""

    jpegs: Jpegs
    boxes: np.ndarray  # [n, 4] int32: x, y, width, height of what the copies need, in pixels
    crops: np.ndarray  # [n, copies, 4] int32: x, y, width, height of each copy within its box
    flips: np.ndarray  # [n, copies] bool: mirror left to right


def encode(rows: Rows, jpegs: Jpegs, copies: int) -> Encoded:
    """What to cut from each JPEG; `jpegs` are the frames of every `copies`-th row, row after row."""
    windows = rows.windows.reshape(-1, copies, 4)
    low = windows[..., :2].min(axis=1)
    high = (windows[..., :2] + windows[..., 2:]).max(axis=1)
    boxes = np.concatenate([low, high - low], axis=1)
    crops = np.concatenate([windows[..., :2] - low[:, None], windows[..., 2:]], axis=2)
    columns = (boxes, crops, rows.flips.reshape(-1, copies))
    return Encoded(jpegs, *(np.repeat(column, rows.frames.shape[1], axis=0) for column in columns))


@dataclass(eq=False)
class Decoder:
    """A DALI pipeline that decodes, crops and resizes batches of samples, each into `copies` rows."""

    data: DataConfig
    decode: DecodeConfig
    device: torch.device
    samples: int
    copies: int = 1
    ahead: int = 1  # batches that DALI works on at the same time
    resize_on_cpu: bool = False  # let DALI resize without a GPU too, for tests and comparisons

    def __post_init__(self) -> None:
        self.resizes = self.device.type == "cuda" or self.resize_on_cpu
        self.whole = self.resizes and self.decode.decode == "whole"
        self.crops = self.resizes and (self.whole or self.copies > 1)  # else a frame is decoded as its crop
        self.threads = max(1, self.decode.threads)
        self.waiting: deque[tuple[Rows, Encoded]] = deque()  # fed, and not yet taken
        self.fed = 0
        self.pipeline = build_pipeline(self)
        self.resizer = None if self.resizes else Resizer(self)

    def stream(self, batches: Iterable[tuple[Rows, Jpegs]]) -> Iterator[tuple[Rows, Tensor]]:
        """Decode batches in their order and give each as `take` does; at least `ahead` batches must come."""
        for rows, jpegs in batches:
            self.feed(rows, jpegs)
            if len(self.waiting) == self.ahead:
                yield self.take()
        while self.waiting:
            yield self.take()

    def feed(self, rows: Rows, jpegs: Jpegs) -> None:
        """Start to decode a batch, given the JPEGs of its frames as `encode` takes them."""
        encoded = encode(rows, jpegs, self.copies)
        for name, values in self.inputs(encoded).items():
            self.pipeline.feed_input(name, values)
        self.waiting.append((rows, encoded))
        self.fed += 1
        if self.fed >= self.ahead:  # the first call starts all batches that were fed
            self.pipeline.schedule_run()

    def take(self) -> tuple[Rows, Tensor]:
        """Wait for the oldest batch: its rows and their frames, uint8 [b, (T,) size, size, 3].

        Later batches do not change these frames. On a GPU they are ordered after the work on the current
        stream, and so is the release of their memory. Raises DALI's RuntimeError.
        """
        gpu = self.device.type == "cuda"
        outputs = self.pipeline.outputs(torch.cuda.current_stream(self.device) if gpu else None)
        rows, encoded = self.waiting.popleft()
        if self.resizer is not None and self.resizer.has_work(encoded):
            frames = self.resizer(outputs[0], encoded)
        else:
            copies = [
                torch.from_dlpack(out.as_tensor()).unflatten(0, (-1, self.data.frames)) for out in outputs
            ]
            frames = copies[0] if len(copies) == 1 else torch.stack(copies, dim=1).flatten(0, 1)
        return rows, frames if self.data.frames > 1 else frames.squeeze(1)

    def inputs(self, encoded: Encoded) -> dict[str, Any]:
        """The pipeline's inputs by name, a list or an array of n entries each."""
        found: dict[str, Any] = {"jpegs": encoded.jpegs}
        if not self.whole:
            found |= corners("box", encoded.boxes)
        for copy in range(self.copies if self.resizes else 0):
            crop = encoded.crops[:, copy]
            if self.crops:
                found |= corners(f"crop{copy}", crop + encoded.boxes * (1, 1, 0, 0) if self.whole else crop)
            sizes = np.full((len(crop), 2), self.data.size, np.float32)
            sizes[encoded.flips[:, copy], 1] *= -1  # a negative width mirrors
            found[f"size{copy}"] = sizes
        return found


def build_pipeline(decoder: Decoder) -> Pipeline:
    """The pipeline whose inputs `Decoder.inputs` gives.

    Its outputs are uint8 frames: per copy [frames, size, size, 3], or where torch resizes the decoded boxes.
    """
    kind, antialias, _ = FILTERS[decoder.data.interpolation]
    gpu = decoder.device.type == "cuda"
    pipeline = Pipeline(
        decoder.samples * decoder.data.frames,
        decoder.threads,
        gpu_index(decoder.device),
        prefetch_queue_depth=decoder.ahead,
    )
    with pipeline:
        # The paddings are of every thread; fancy upsampling makes the GPU's chroma equal the CPU's.
        pixels = (fn.decoders.image if decoder.whole else fn.decoders.image_slice)(
            fn.external_source(name="jpegs"),
            *(() if decoder.whole else corner_inputs("box").values()),
            device="mixed" if gpu else "cpu",
            jpeg_fancy_upsampling=True,
            hw_decoder_load=decoder.decode.hw_decoder_load,
            device_memory_padding=PADDING,
            host_memory_padding=PADDING,
        )
        outputs: list[object] = [] if decoder.resizes else [pixels]
        for copy in range(decoder.copies if decoder.resizes else 0):
            crop = (
                fn.slice(pixels, **corner_inputs(f"crop{copy}"), axis_names="WH") if decoder.crops else pixels
            )
            size = fn.external_source(name=f"size{copy}")
            outputs.append(fn.resize(crop, size=size, interp_type=kind, antialias=antialias))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def gpu_index(device: torch.device) -> int | None:
    """The device's number for DALI; None is the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def corner_inputs(name: str) -> dict[str, Any]:
    """Two inputs of a pipeline, with what `corners` gives for this name."""
    return {part: fn.external_source(name=f"{name}_{part}") for part in ("start", "shape")}


def corners(name: str, rectangles: np.ndarray) -> dict[str, np.ndarray]:
    """[n, 4] rectangles -> start (x, y) and shape (width, height), int32 [n, 2] each, named after `name`."""
    whole = rectangles.astype(np.int32)
    return {f"{name}_start": whole[:, :2].copy(), f"{name}_shape": whole[:, 2:].copy()}


class Resizer:
    """Crops decoded boxes and resizes them with torch's uint8 kernels, which release the GIL, in threads."""

    def __init__(self, decoder: Decoder) -> None:
        size = decoder.data.size
        self.shape = (decoder.samples, decoder.copies, decoder.data.frames, size, size, 3)
        self.threads, self.kernel = decoder.threads, FILTERS[decoder.data.interpolation][2]
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="resize")
        self.free: list[np.ndarray] = []

    def has_work(self, encoded: Encoded) -> bool:
        """Whether any frame differs from what was decoded for it."""
        one = self.shape[1] == 1 and (encoded.boxes[:, 2:] == self.shape[-2]).all()
        return not one or bool(encoded.flips.any())

    def __call__(self, decoded: Sequence[object], encoded: Encoded) -> Tensor:
        """n decoded boxes, uint8 [h, w, 3] -> uint8 [samples * copies, T, size, size, 3]."""
        boxes = [np.asarray(decoded[index]) for index in range(len(encoded.jpegs))]
        out = self.recycled()
        slots = [slot for sample in out.transpose(1, 2) for slot in sample]
        parts = [slice(start, None, self.threads) for start in range(self.threads)]
        columns = (
            [column[part] for part in parts] for column in (boxes, encoded.crops, encoded.flips, slots)
        )
        list(self.pool.map(resize, *columns, repeat(self.kernel)))
        return out.flatten(0, 1)

    def recycled(self) -> Tensor:
        """A uint8 tensor whose memory comes back to `free` once nothing refers to it any more.

        Fresh memory costs a page fault for every 4 KiB, in all as much as the resizing.
        """
        memory = self.free.pop() if self.free else np.empty(self.shape, np.uint8)
        view = memory.view()  # what the tensor, and every view of it, keeps alive
        weakref.finalize(view, self.free.append, memory)
        return torch.from_numpy(view)


def resize(
    boxes: Sequence[np.ndarray], crops: np.ndarray, flips: np.ndarray, results: Sequence[Tensor], kernel: Any
) -> None:
    """Fill n results, uint8 [copies, H, W, 3], with crops [n, copies, 4] of n boxes, uint8 [h, w, 3]."""
    for box, rectangles, mirrored, copies in zip(boxes, crops.tolist(), flips.tolist(), results, strict=True):
        for (x, y, w, h), flip, result in zip(rectangles, mirrored, copies, strict=True):
            # numpy cuts and copies on this thread, where torch would start its own.
            crop = box[y : y + h, x : x + w]
            if crop.shape == result.shape:
                np.copyto(result.numpy(), crop)
            else:
                whole = torch.from_numpy(np.ascontiguousarray(crop))
                planes, out = whole.permute(2, 0, 1)[None], result.permute(2, 0, 1)[None]
                kernel(planes, list(result.shape[:2]), False, None, None, out=out)
            if flip:
                mirror(result)


def mirror(frame: Tensor) -> None:
    """Mirror a frame [H, W, 3] left to right in place, in strips too small to start torch's own threads."""
    for strip in frame.split(max(1, SERIAL // (3 * frame.shape[1]) - 1)):
        strip.copy_(strip.flip(1))


# ---- frames that do not decode


def frame_at(dataset: Dataset, rows: Rows, copies: int, place: int) -> tuple[int, str]:
    """The sample of the frame that is JPEG `place` of a batch, and the frame's tar, member and byte."""
    row, column = divmod(place, rows.frames.shape[1])
    sample, frame = int(rows.ids[row * copies]), int(rows.frames[row * copies, column])
    offset = int(dataset.offset[dataset.first_frame[sample] + frame])
    tar = dataset.tar_path(int(dataset.shard[sample]))
    return sample, f"{tar}: {dataset.member_name(sample, frame)} at byte {offset}"


def raise_undecodable(dataset: Dataset, decoder: Decoder, error: RuntimeError) -> None:
    """Raise a UserError that names the frame on which the decoder failed, if one fails when decoded alone."""
    small = replace(decoder.data, frames=1, size=8)
    alone = replace(decoder, data=small, samples=1, ahead=1)
    gpu = decoder.device.type == "cuda"
    fix = (
        f"{cause(error)}; set speed.decode to whole and speed.hw_decoder_load to 0, or use the CPU "
        "(DEVICE=cpu, --speed.device cpu)"
    )
    for rows, encoded in decoder.waiting:
        for place, jpeg in enumerate(encoded.jpegs):
            if decodes(alone, rows, place, jpeg):
                continue
            _, where = frame_at(dataset, rows, decoder.copies, place)
            if gpu and decodes(replace(alone, device=CPU, resize_on_cpu=True), rows, place, jpeg):
                raise UserError(
                    f"the GPU's decoder failed on {where}, which the CPU decodes: {fix}"
                ) from error
            raise UserError(
                f"{where} does not decode, although its checksum is correct ({cause(error).rstrip(' :')}); "
                f"inspect it with `make verify DATA={dataset.info.root}`"
            ) from error
    if gpu and decoder.waiting:
        _, where = frame_at(dataset, decoder.waiting[0][0], decoder.copies, 0)
        raise UserError(f"the GPU's decoder failed on a batch that begins with {where}: {fix}") from error


def decodes(alone: Decoder, rows: Rows, place: int, jpeg: np.ndarray) -> bool:
    """Whether JPEG `place` of a batch decodes alone. Raises errors that no JPEG can cause."""
    first = place // rows.frames.shape[1] * alone.copies
    part = Rows._make(column[first : first + alone.copies] for column in rows)
    try:
        alone.feed(part._replace(frames=part.frames[:, :1]), [jpeg])
        alone.take()
    except RuntimeError as error:
        if of_machine(error):
            raise
        return False
    return True
