"""Compare the speed of training with plain loops: python -m benchmarks training

Ours is `python -m train.mae` or `train.finetune` on packed shards; the others are benchmarks/plain_loop.py
on the unpacked files, with the same pixels. All train a model of pico size on the CPU, on the same pictures
with the same crops, batch and threads, and print every step. Each runs in a new process; they take turns. The
first step is timed from the start of the process.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.loader import data_in
from benchmarks.results import Results, show
from pipelines.errors import UserError, run_cli

WARM = 5  # steps that do not count
BATCH = {"images": 32, "clips": 8}


def contenders(work: Path, runs: Path, steps: int) -> dict[str, dict[str, list[str]]]:
    """Module and arguments of all contenders, by comparison; ours is first."""

    def ours(program: str, preset: str, shards: str, kind: str, compiled: str = "no") -> list[str]:
        # Each in a folder of its own; a second run in the same one would resume the first.
        place = ["--data.path", str(work / shards), "--run.root", str(runs / f"compiled-{compiled}")]
        length = ["--optim.batch", str(BATCH[kind]), "--run.log-every", "1", "--optim.warmup-epochs", "0"]
        # Only the last step is evaluated and saved: the plain loops do neither.
        length += ["--run.eval-every", str(steps), "--run.checkpoint-every", str(steps)]
        # Half a step less, so that the rounded quotient is exactly `steps`.
        epochs = ["--optim.epochs", str((steps - 0.5) * BATCH[kind] / samples(work / shards))]
        speed = ["--speed.micro-batch", str(BATCH[kind]), "--speed.compile", compiled]
        # The plain loops do not use a GPU.
        return [program, preset, *place, *length, *epochs, *speed, "--speed.device", "cpu"]

    def plain(model: str, folder: str, kind: str, *more: str) -> list[str]:
        counts = ["--batch", str(BATCH[kind]), "--steps", str(steps)]
        return ["benchmarks.plain_loop", "--data", str(work / folder), "--model", model, *counts, *more]

    return {
        "images, finetuning": {
            "ours": ours("train.finetune", "image-ft-pico", "as-is", "images"),
            "our model in a plain loop": plain("ours", "originals", "images"),
            "timm's model in a plain loop": plain("timm", "originals", "images"),
        },
        "images, MAE": {
            "ours": ours("train.mae", "image-mae-pico", "as-is", "images"),
            "ours, compiled": ours("train.mae", "image-mae-pico", "as-is", "images", "yes"),
            "our model in a plain loop": plain("ours", "originals", "images", "--mae"),
            "transformers' model in a plain loop": plain("transformers", "originals", "images", "--mae"),
        },
        "clips, finetuning": {
            "ours": ours("train.finetune", "video-ft-pico", "clips", "clips"),
            "our model in a plain loop": plain("ours", "frames", "clips", "--clips"),
        },
        "clips, MAE": {
            "ours": ours("train.mae", "video-mae-pico", "clips", "clips"),
            "ours, compiled": ours("train.mae", "video-mae-pico", "clips", "clips", "yes"),
            "our model in a plain loop": plain("ours", "frames", "clips", "--clips", "--mae"),
        },
    }


def samples(shards: Path) -> int:
    from pipelines.dataset import open_dataset

    return len(open_dataset(shards, "train"))


def trial(command: list[str], batch: int, steps: int) -> dict[str, float]:
    """Run `python -m COMMAND` and time the lines "step N: ..." that it prints.

    Raises UserError if it fails or does not print all steps. Memory is that of the largest process.
    """
    begin, marks = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=-1, stderr=-2, text=True)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step "):
            marks.append(time.perf_counter() - begin)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"python -m {' '.join(command)} failed: {''.join(printed)[-500:]}")
    if len(marks) != steps:
        text = f"python -m {' '.join(command)} printed {len(marks)} steps instead of {steps}"
        raise UserError(f"{text}: {''.join(printed)[-500:]}")
    seconds = marks[-2] - marks[WARM - 1]  # our last line also includes the evaluation
    rate = batch * (len(marks) - 1 - WARM) / seconds
    per_cpu = batch * len(marks) / (usage.ru_utime + usage.ru_stime)
    columns = ("samples/s", "samples per CPU second", "first step (s)", "memory (MB)")
    return dict(zip(columns, (rate, per_cpu, marks[0], usage.ru_maxrss / 1e3), strict=True))


def run(
    work: Path = Path("/tmp/hiera-train-bench"),
    images: Path = Path("data/imagenet"),
    steps: int = 40,
    rounds: int = 5,
    only: str = "",
) -> Results:
    """All contenders train in turn.

    Args:
        work: the data of `benchmarks.loader`, made from `images` if it is missing.
        images: folder of JPEG pictures, searched through.
        steps: steps per training; the first do not count for the rate.
        rounds: trainings per contender.
        only: measure only comparisons whose name contains this.
    """
    data_in(work, images)
    found: Results = {}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as runs:
            for title, racing in contenders(work, Path(runs), steps).items():
                for name, command in racing.items() if only in title else ():
                    print(f"round {number + 1} of {rounds}: {title}, {name}", file=sys.stderr, flush=True)
                    columns = found.setdefault(f"training: {title}", {}).setdefault(name, {})
                    batch = BATCH[title.partition(",")[0]]
                    for column, value in trial(command, batch, steps).items():
                        columns.setdefault(column, []).append(value)
    return found


if __name__ == "__main__":
    run_cli(lambda: show(tyro.cli(run, prog="python -m benchmarks.training")))
