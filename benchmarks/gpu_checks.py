"""The checks of `make gpu-check` on the machine and on decoding.

Each takes a Place and returns a line for the table. It raises Problem, or an error of the library.
"""

import dataclasses
import importlib.metadata
import io
import itertools
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.gpu_place import Place, need
from pipelines.config import DataConfig, DecodeConfig
from pipelines.dataset import open_dataset
from pipelines.decode import FILTERS, Decoder, Encoded, encode, gpu_index
from pipelines.views import Rows, train_rows

LIBRARIES = ("torch", "triton", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "timm")
LEAST_DRIVER = 580  # CUDA 13


# ---- machine


def machine(place: Place) -> str:
    """Driver, device, compiler and library versions."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    parts = [f"{name.removeprefix('nvidia-')} {installed[name]}" for name in LIBRARIES if name in installed]
    parts.append(f"Python {platform.python_version()}")
    need(shutil.which("gcc") or shutil.which("cc"), "no C compiler found; torch.compile needs one")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    need(header.exists(), f"{header} is missing; torch.compile needs Python's headers")
    if not place.gpu:
        return f"{os.cpu_count()} cores; {', '.join(parts)}"
    version = driver()
    need(
        version == "" or int(version.split(".")[0]) >= LEAST_DRIVER,
        f"the driver is {version}; CUDA 13 needs {LEAST_DRIVER} or newer",
    )
    found = torch.cuda.get_device_properties(place.device)
    need(found.major >= 8, f"{found.name} has compute capability {found.major}.{found.minor}; bf16 needs 8.0")
    memory = f"{found.total_memory / 2**30:.0f} GB"
    return (
        f"{torch.cuda.device_count()} x {found.name}, {memory}, driver {version or '?'}; {', '.join(parts)}"
    )


def driver() -> str:
    """Driver version from nvidia-smi; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return words[0] if words and words[0][0].isdigit() else ""


def loaded_library(word: str) -> str:
    """The path of the first shared library in this process whose name contains `word`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = sorted({line.split()[-1] for line in lines if word in line})
    return paths[0] if paths else "not loaded"


# ---- decoding


def decode(
    jpegs: list[NDArray[np.uint8]], device: torch.device, windows: NDArray | None = None
) -> list[NDArray]:
    """Decode JPEGs with DALI on `device`: all pixels, or only windows [n, 4] (x, y, width, height)."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    place = "mixed" if device.type == "cuda" else "cpu"
    pipeline = Pipeline(len(jpegs), 4, gpu_index(device), prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=[jpegs], cycle=True, batch=True)
        if windows is None:
            pixels = fn.decoders.image(encoded, device=place, jpeg_fancy_upsampling=True)
        else:
            corners = (windows[:, :2].copy(), windows[:, 2:].copy())
            starts, shapes = (fn.external_source(source=[v], cycle=True) for v in corners)
            pixels = fn.decoders.image_slice(
                encoded, starts, shapes, device=place, jpeg_fancy_upsampling=True
            )
        pipeline.set_outputs(pixels)
    pipeline.build()
    (out,) = pipeline.run()
    host = out.as_cpu() if place == "mixed" else out
    return [np.array(host[index]) for index in range(len(jpegs))]


def most_apart(ones: list[NDArray], others: list[NDArray]) -> float:
    """Largest mean difference between two pictures, in levels; infinite if shapes differ."""
    pairs = zip(ones, others, strict=True)
    return max(np.abs(a.astype(int) - b).mean() if a.shape == b.shape else float("inf") for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch before it is decoded."""

    config: DataConfig
    rows: Rows
    jpegs: list[NDArray[np.uint8]]

    @property
    def encoded(self) -> Encoded:
        return encode(self.rows, self.jpegs, self.config.copies)


def fed(
    path: Path, rows: int, frames: int = 1, copies: int = 1, kind: str = "triangular", size: int = 96
) -> Fed:
    """The first `rows` samples of packed shards in random views."""
    dataset = open_dataset(path, "train")
    settings: dict[str, Any] = {"interpolation": kind, "repeats": copies, "same_clip": copies > 1}
    config = DataConfig(size=size, frames=frames, scale=(0.08, 1.0), **settings)
    ids = np.repeat(np.arange(rows) % len(dataset), copies)
    drawn = train_rows(dataset, config, 0, ids, np.tile(np.arange(copies), rows).astype(np.int64))
    jpegs = dataset.read(drawn.ids[:: config.copies], drawn.frames[:: config.copies])
    return Fed(config, drawn, jpegs)


def batches(
    batch: Fed,
    device: torch.device,
    load: float = 0.65,
    threads: int = 4,
    decode: Literal["whole", "window"] = "whole",
) -> Iterator[Tensor]:
    """The same batch repeatedly, decoded as in training; DALI resizes also on the CPU."""
    samples, copies = len(batch.jpegs) // batch.config.frames, batch.config.copies
    settings = DecodeConfig(threads=threads, hw_decoder_load=load, decode=decode)
    decoder = Decoder(batch.config, settings, device, samples, copies, ahead=2, resize_on_cpu=True)
    for _, frames in decoder.stream(itertools.repeat((batch.rows, batch.jpegs))):
        yield frames


def whole_decoding(place: Place) -> str:
    """Pictures decoded on the GPU are equal to those of the CPU."""
    feed = fed(place.images, 64)
    apart = most_apart(decode(feed.jpegs, place.device), decode(feed.jpegs, torch.device("cpu")))
    need(apart < 1.5, f"a picture differs by {apart:.2f} levels on average from the CPU's")
    return f"at most {apart:.2f} levels on average; nvJPEG: {loaded_library('nvjpeg')}"


def windows(place: Place) -> str:
    """Crops of the training pipeline are equal to the CPU's, for all filters and numbers of copies."""
    worst = 0.0
    for kind in FILTERS:
        for path, frames, copies in ((place.images, 1, 1), (place.images, 1, 3), (place.clips, 4, 2)):
            feed = fed(path, 32, frames, copies, kind)
            ours = next(batches(feed, place.device)).cpu().float()
            theirs = next(batches(feed, torch.device("cpu"))).float()
            apart = (ours - theirs).abs()
            worst = max(worst, apart.mean().item())
            high = apart.flatten().kthvalue(int(apart.numel() * 0.999)).values.item()
            need(
                worst < 2 and high < 24,
                f"{kind}, {frames} frames, {copies} copies: mean {worst:.2f} levels, 99.9 % below {high:.0f}",
            )
    return f"at most {worst:.2f} levels on average from the CPU's"


def region_decoding(place: Place) -> str:
    """Decode only a window (nvImageCodec issue 55: it crashes on some GPUs). Training does not need it."""
    feed = fed(place.images, 64)
    ours, theirs = (decode(feed.jpegs, d, feed.encoded.boxes) for d in (place.device, torch.device("cpu")))
    apart = most_apart(ours, theirs)
    need(apart < 1.5, f"a window differs by {apart:.2f} levels on average from the CPU's")
    return f"at most {apart:.2f} levels on average from the CPU's"


def order_independence(place: Place) -> str:
    """A sample's pixels do not depend on its place in the batch."""
    feed = fed(place.images, 64)
    first = next(batches(feed, place.device, load=0.0))
    order = np.arange(64)[::-1].copy()
    rows, jpegs = Rows._make(column[order] for column in feed.rows), [feed.jpegs[i] for i in order]
    turned = Fed(feed.config, rows, jpegs)
    apart = {}
    for load in (0.0, 0.65, 1.0) if place.gpu else (0.0,):
        second = next(batches(turned, place.device, load)).flip(0)
        apart[load] = (second.int() - first.int()).abs().max().item()
    need(apart[0.0] == 0, f"without decoding engines a pixel differs by {apart[0.0]} levels")
    return "largest difference by engine share: " + ", ".join(f"{k:g}: {v}" for k, v in apart.items())


def buffer_lifetime(place: Place) -> str:
    """A batch keeps its bytes while later ones are made, also during a long kernel."""
    feed = fed(place.images, 64)
    sums, kept = [], []
    for number, pixels in zip(range(24), batches(feed, place.device), strict=False):
        if place.gpu and number % 4 == 0:
            torch.cuda._sleep(200_000_000)
        sums.append(pixels.sum(dtype=torch.int64))
        kept = [*kept[-5:], pixels]
        pixels.add_(1)  # in place, as augmentation does
    values = torch.stack(sums).tolist()
    need(len(set(values)) == 1, f"{len(set(values))} different sums of 24 equal batches")
    return "24 equal batches"


def hostile_pictures(place: Place) -> str:
    """Gray, progressive, 4:4:4 and one-pixel pictures decode, also after a damaged picture."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
    picture = coarse.resize((160, 120), Image.Resampling.BICUBIC)
    kinds = {
        "gray": encoded(picture.convert("L")),
        "progressive": encoded(picture, progressive=True),
        "4:4:4": encoded(picture, subsampling=0),
        "one pixel": encoded(picture.resize((1, 1))),
    }
    for name, data in kinds.items():
        wanted = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
        apart = most_apart(decode([data], place.device), [wanted])
        need(apart < 3, f"{name}: {apart:.2f} levels on average from Pillow's")
    whole = encoded(picture)
    try:
        decode([whole[: len(whole) // 2]], place.device)
        damaged = "decodes in part"
    except RuntimeError:
        damaged = "is refused"
    need(
        most_apart(decode([whole], place.device), [np.asarray(picture)]) < 6,
        "nothing decodes after a damaged one",
    )
    return f"{', '.join(kinds)} decode; a damaged one {damaged}"


def encoded(picture: Image.Image, **options: object) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)
