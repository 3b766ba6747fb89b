"""Memory of a long run, by kind: taskset -c 0 python -m benchmarks growth [--steps N --without ema ...]

A pico classifier is finetuned on the CPU at 32 pixels. Each line shows, in MB, resident memory, its peak so
far, and the parts of the first: files (libraries), glibc's heaps (in use, free), blocks that glibc maps, and
others (the allocators of Python and Arrow, stacks). The last number counts Python objects.
"""

import ctypes
import gc
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from pipelines.config import Augment
from pipelines.errors import run_cli
from pipelines.loader import Batch
from tools.pack import ImageOptions, pack_images
from train import build, finetune, loop
from train.presets import FINETUNE_PRESETS

PICTURES, BATCH, NEVER = 200, 8, 10**9
HEADS = ("step", "resident", "peak", "files", "heaps", "in use", "free", "mapped", "others", "objects")
Part = Literal["evaluation", "checkpoints", "ema", "detail", "augment"]


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def memory(trim: bool) -> list[float]:
    """The numbers of a line, without its step."""
    libc, objects = ctypes.CDLL(None), len(gc.get_objects())
    if trim:
        libc.malloc_trim(0)
    libc.mallinfo2.restype = Mallinfo
    arena, _, _, _, mapped, _, _, used, free, _ = libc.mallinfo2().sizes
    lines = map(str.split, Path("/proc/self/smaps_rollup").read_text().splitlines())
    held = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    resident, own = held["Rss:"], held["Anonymous:"]
    peak = getrusage(RUSAGE_SELF).ru_maxrss * 1024
    sizes = resident, peak, resident - own, arena, used, free, mapped, own - arena - mapped
    return [*(size / 1e6 for size in sizes), objects]


def pack(work: Path) -> Path:
    """Pictures of 100 to 700 pixels per side in four classes, packed."""
    draws = np.random.default_rng(0)
    for number in range(PICTURES):
        path = work / "source" / str(number % 4) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = draws.integers(100, 700, 2)
        noise = draws.integers(0, 255, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(noise).resize((width, height)).save(path)
    pack_images(work / "source", work / "shards", ImageOptions(workers=1))
    return work / "shards"


def run(steps: int = 2000, every: int = 100, without: tuple[Part, ...] = (), trim: bool = False) -> None:
    """Train with four evaluations, 20 checkpoints, a moving average, RandAugment and a row for each step.

    Args:
        steps: optimizer steps.
        every: steps from one line to the next.
        without: what is left out.
        trim: return free memory to the kernel before each line.
    """
    real = build.training_batches

    def batches(*given: Any) -> Iterator[Batch]:
        for step, batch in enumerate(real(*given)):
            if step and step % every == 0:
                print("MB", *(f"{value:9.0f}" for value in (step, *memory(trim))), flush=True)
            yield batch

    config = FINETUNE_PRESETS["image-ft-pico"]
    with tempfile.TemporaryDirectory() as folder:
        augment = Augment(layers=2 * ("augment" not in without))
        data = replace(config.data, path=pack(Path(folder)), size=32, augment=augment)
        optim = replace(config.optim, batch=BATCH, lr_batch=BATCH, epochs=steps * BATCH / (0.9 * PICTURES))
        run = replace(config.run, root=Path(folder), name="growth", detail="detail" not in without)
        run = replace(run, eval_every=NEVER if "evaluation" in without else steps // 4)
        run = replace(run, checkpoint_every=NEVER if "checkpoints" in without else steps // 20)
        optim = replace(optim, warmup_epochs=0, ema=0.0 if "ema" in without else 0.99)
        speed = replace(config.speed, device="cpu", micro_batch=BATCH)
        build.training_batches = batches  # pyrefly: ignore
        print("MB", *(f"{head:>9}" for head in HEADS), flush=True)
        loop.fit(replace(config, data=data, optim=optim, run=run, speed=speed), finetune.make_task)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run, description=__doc__))
