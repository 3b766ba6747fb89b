"""The checks of `make gpu-check` that run training commands, its rates, and its generated data."""

import contextlib
import csv
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_place import Place, need
from benchmarks.gpu_process import last_line
from benchmarks.memory import need_of
from pipelines.machine import usable_cores
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

RECIPES = ("image-mae-base", "image-ft-base", "video-mae-base", "video-ft-base")
SHORT = ("--speed.compile", "no", "--optim.batch", "64", "--speed.micro-batch", "32", "--run.log-every", "1")
CLASSES = ("first", "second")
Rates = dict[str, float]
Decode = Literal["whole", "window"]

# This program trains in PyTorch's sync debug mode: an operation of a step that waits for the device raises.
WATCHED = """
import train, torch
from train import finetune, loop
accumulate, steps = loop._accumulate, []
def watched(*arguments):
    steps.append(0)
    torch.cuda.set_sync_debug_mode("error" if len(steps) > 2 else "default")
    try:
        return accumulate(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
loop._accumulate = watched
finetune.main()
"""


# ---- data: smooth noise of about the size that packed ImageNet has


def draw_data(work: Path) -> tuple[Path, Path]:
    """Generate and pack 512 pictures, and 64 clips of 40 frames (4 for validation); return their folders."""
    images, clips = work / "shards/images", work / "shards/clips"
    jobs = [
        (work / "images" / name / f"{i:03d}.JPEG", (label, i), 1)
        for label, name in enumerate(CLASSES)
        for i in range(256)
    ]
    rows = []
    for label, name in enumerate(CLASSES):
        for i in range(32):
            video = f"clip-{label}-{i:05d}"
            jobs.append(
                (work / "frames" / name / f"{video}_000000_000010" / "frame_{:05d}.jpg", (label, i), 40)
            )
            rows.append((name, video, 0, 10, "val" if i < 2 else "train", 0))
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(lambda job: draw_frames(*job), jobs))
    for split in ("train", "val"):
        with (work / f"tiny_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("label", "youtube_id", "time_start", "time_end", "split", "is_cc")])
            csv.writer(file).writerows(row for row in rows if row[4] == split)
    run("tools.pack", "images", "--source", work / "images", "--out", images, "--val-fraction", 0)
    run("tools.pack", "clips", "--frames", work / "frames", "--annotations", work, "--out", clips)
    return images, clips


def draw_frames(path: Path, key: tuple[int, int], frames: int) -> None:
    """Write JPEGs of 340 x 256 pixels: windows that move over one noisy picture.

    path: a file; for several frames, a pattern with {} for the number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(key)
    coarse = draw.integers(0, 190, (12, 16, 3)) + 60 * key[0]
    large = Image.fromarray(coarse.astype(np.uint8)).resize((380, 296), Image.Resampling.BICUBIC)
    noisy = np.asarray(large).astype(int) + draw.normal(0, 8, (296, 380, 3)).astype(int)
    picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    for number in range(frames):
        window = picture.crop((number, number, number + 340, number + 256))
        window.save(str(path).format(number + 1), "JPEG", quality=85)


# ---- training commands


def run(module: str, *command: object) -> str:
    """Run a command of this project and return its output. Raises Problem if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, command)], capture_output=True, text=True, check=False
    )
    printed = done.stdout + done.stderr
    need(done.returncode == 0, f"{module} ended with exit code {done.returncode}: {last_line(printed)}")
    return printed


def train_command(place: Place, preset: str, name: str, *more: object) -> list[str]:
    """The command that trains a preset on the drawn data."""
    program = "train.mae" if "-mae-" in preset else "train.finetune"
    data = place.clips if preset.startswith("video") else place.images
    command = [program, preset, "--data.path", data, "--run.root", place.work, "--run.name", name]
    return list(map(str, [*command, "--speed.device", place.device.type, "--run.eval-every", 10**6, *more]))


def rows_of(place: Place, name: str) -> list[dict[str, str]]:
    path = place.work / name / "metrics.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def rows_equal_detail(place: Place) -> str:
    """Every row of metrics.csv has the loss of its step, also where a checkpoint is written."""
    more = ("--run.detail", True, "--run.checkpoint-every", 3, "--optim.epochs", 2)
    run(*train_command(place, "image-mae-pico", "rows", *SHORT, *more))
    rows = {row["step"]: row["loss_train"] for row in rows_of(place, "rows")}
    details = [
        row for path in (place.work / "rows/detail").glob("*.csv") for row in csv.DictReader(path.open())
    ]
    wrong = [
        d["step"]
        for d in details
        if abs(float(d["loss"]) - float(rows.get(d["step"]) or "nan")) > 1e-5 or not rows.get(d["step"])
    ]
    need(details and not wrong, f"rows of steps {', '.join(wrong)} are wrong")
    return f"{len(details)} rows"


def no_waits(place: Place) -> str:
    """No operation within a step waits for the device, with every augmentation and mixing."""
    augment = ("--data.augment.layers", 2, "--data.augment.jitter", 0.3, "--data.augment.erase", 0.5)
    more = (*augment, "--mixup", 0.8, "--cutmix", 1, "--optim.ema", 0.9, "--optim.epochs", 2)
    _, *command = train_command(place, "image-ft-pico", "waits", *SHORT, *more)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *command], capture_output=True, text=True, check=False
    )
    lines = [
        line.strip() for line in done.stderr.splitlines() if 'File "' in line and "site-packages" not in line
    ]
    need(done.returncode == 0, f"{last_line(done.stderr)} {lines[-1] if lines else ''}")
    return "no operation waits"


def resume_and_stop(place: Place) -> str:
    """SIGTERM saves and ends with exit code 143; the resumed run finishes and needs no more memory."""
    # 24 steps; on a GPU they may end before the signal comes.
    epochs = 40 if place.gpu else 3
    command = train_command(place, "image-mae-pico", "stopped", *SHORT, "--optim.epochs", epochs)
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: len(rows_of(place, "stopped")) >= 4 or process.poll() is not None, 90)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    need(process.returncode == 143, f"exit code {process.returncode} after SIGTERM: {last_line(printed)}")
    before = float(rows_of(place, "stopped")[-1]["max_mem_gb"])
    printed = run(*command)
    need("resumed from step" in printed, f"it did not resume: {last_line(printed)}")
    after = float(rows_of(place, "stopped")[-1]["max_mem_gb"])
    need(
        not place.gpu or after < before * 1.02 + 0.01,
        f"{after:.2f} GiB after the resume, {before:.2f} GiB before",
    )
    return f"exit code 143, resumed; {before:.2f} GiB before, {after:.2f} GiB after"


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.2)


def out_of_memory(place: Place) -> str:
    """A micro batch of twice to four times what fits ends the run with one line and exit code 2."""
    total = torch.cuda.get_device_properties(place.device).total_memory / 2**30
    micro = 4 * max(1, need_of("hiera_base_224").micro_batch(total))
    large = ("--optim.batch", micro, "--speed.micro-batch", micro, "--speed.compile", "no")
    command = train_command(place, "image-ft-base", "memory", *large)
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    fine = done.returncode == 2 and "speed.micro_batch" in done.stderr and "Traceback" not in done.stderr
    need(fine, f"micro batch {micro}: exit code {done.returncode}: {last_line(done.stderr)}")
    return f"micro batch {micro}: one line, exit code 2"


def ranks_end_together(place: Place) -> str:
    """Two processes train together; if one is killed, the other exits."""
    more = ("--speed.processes", 2, "--optim.epochs")
    run(*train_command(place, "image-mae-pico", "two", *SHORT, *more, 1))
    command = train_command(place, "image-mae-pico", "killed", *SHORT, *more, 500)
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(rows_of(place, "killed")) >= 2 or process.poll() is not None, 90)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    need(len(children) >= 2, "the two processes did not start")
    os.kill(int(children[-1]), signal.SIGKILL)
    begin = time.monotonic()
    code = process.wait(timeout=60)
    need(code != 0, "exit code 0 although a process was killed")
    return f"the other ended {time.monotonic() - begin:.0f} s after one was killed"


def nonfinite_steps(place: Place) -> str:
    """Steps with non-finite gradients are skipped; ten in a row end the run with one line."""
    more = ("--optim.lr", 1e30, "--optim.warmup-epochs", 0, "--optim.epochs", 3)
    command = train_command(place, "image-mae-pico", "nonfinite", *SHORT, *more)
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    need(
        done.returncode == 2 and "non-finite gradients" in done.stderr,
        f"exit {done.returncode}: {last_line(done.stderr)}",
    )
    return "skipped, then one line and exit code 2"


# ---- rates


def loading_rates(place: Place, path: Path, frames: int, rows: int, decode: Decode) -> Rates:
    """Frames per second of the loading pipeline at 224 pixels, by "threads, engine share, decoding"."""
    from benchmarks.gpu_checks import batches, fed

    rates: Rates = {}
    feed = fed(path, rows, frames, size=224)
    grid = ((4, 0.65), (8, 0.65), (12, 0.65), (12, 0.0), (12, 0.9))
    for threads, load in grid if place.gpu else ((usable_cores(), 0.65),):
        made = batches(feed, place.device, load, threads, decode)
        rates[f"{threads} threads, engine share {load:g}, {decode}"] = (
            rows * frames * per_second(functools.partial(next, made), place, 10)
        )
    return rates


def loading_pictures(place: Place, decode: Decode = "whole") -> Rates:
    """Pictures per second from the loading pipeline."""
    return loading_rates(place, place.images, 1, 256 if place.gpu else 64, decode)


def loading_clips(place: Place, decode: Decode = "whole") -> Rates:
    """Frames per second from the loading pipeline, clips of 16."""
    return loading_rates(place, place.clips, 16, 16 if place.gpu else 4, decode)


def step_rates(recipe: str, place: Place, attention: Literal["flash", "cuDNN"] = "flash") -> Rates:
    """Samples per second of a bare eager step by micro batch; with flash attention, upstream's too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.model import make_step

    name = {**MAE_PRESETS, **FINETUNE_PRESETS}[recipe].model.name
    smallest = 8 if recipe.startswith("video") else 64
    rates: Rates = {}
    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[attention]
    for micro in (smallest * factor for factor in (1, 2, 4, 8)):
        try:
            step, _ = make_step(name, "ours", micro, place.device)
            # By default PyTorch takes math before cuDNN, except on an H100 or a B200.
            with sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
                rates[f"micro {micro}, {attention}"] = micro * per_second(step, place, 5)
        except torch.OutOfMemoryError:
            break
        finally:
            step = None
            torch.cuda.empty_cache()
    if attention == "flash":
        with contextlib.suppress(ImportError, torch.OutOfMemoryError):
            step, _ = make_step(name, "hiera-transformer", smallest, place.device)
            rates[f"micro {smallest}, upstream"] = smallest * per_second(step, place, 5)
    return rates


def per_second(call: Callable[[], object], place: Place, count: int) -> float:
    """Calls per second, after three warm-up calls."""
    begin = 0.0
    for number in range(3 + count):
        if number == 3:
            finish(place)
            begin = time.perf_counter()
        call()
    finish(place)
    return count / (time.perf_counter() - begin)


def finish(place: Place) -> None:
    """Wait for the GPU."""
    if place.gpu:
        torch.cuda.synchronize()


def training_rates(recipe: str, place: Place, flags: list[str]) -> Rates:
    """A compiled training of 40 steps with the recommended settings: rate, MFU, data wait, memory."""
    micro = int(flags[flags.index("--speed.micro-batch") + 1])
    samples = 60 if recipe.startswith("video") else 512
    more = ("--optim.batch", micro, "--optim.epochs", 40 * micro / samples, "--run.log-every", 10)
    printed = run(*train_command(place, recipe, recipe, *flags, *more, "--run.checkpoint-every", 10**6))
    row = rows_of(place, recipe)[-1]
    found = {"samples/s": float(row["samples_per_s"]), "memory (GiB)": float(row["max_mem_gb"])}
    found["data wait (%)"] = 100 * float(row["data_wait_ms"]) / float(row["step_ms"])
    if row["mfu"]:
        found["MFU (%)"] = 100 * float(row["mfu"])
    failed = next((line for line in printed.splitlines() if "torch.compile: FAILED" in line), "")
    need(not failed, f"{failed.strip()}; without it: {found}")  # the training continued
    return found
