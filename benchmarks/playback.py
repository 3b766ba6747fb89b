"""Generate clips whose class is only the order of their frames: python -m benchmarks.playback --help

Every clip of a tree like Tiny-Kinetics-400 is written three times with the same 16 frames: smooth (in order),
to and fro (with each pair of frames swapped), and jumbled. A model that ignores the order has an accuracy of
one third.
"""

import csv
import random
import shutil
from pathlib import Path

import tyro

from pipelines.errors import run_cli
from tools.pack import find_list
from tools.samples import read_annotations

FRAMES = 16
ORDERS = ("smooth", "to and fro", "jumbled")


def order_of(label: str, draw: random.Random) -> list[int]:
    """The 16 frames of a clip in the order of `label`."""
    frames = list(range(FRAMES))
    if label == "to and fro":
        return [index ^ 1 for index in frames]
    if label == "jumbled":
        draw.shuffle(frames)
    return frames


def playback(frames: Path, annotations: Path, out: Path) -> None:
    """Write out/frames and out/annotations, for `tools.pack clips`; clips below 16 frames are left out.

    Args:
        frames: folder with <label>/<youtube_id>_<start>_<end>/frame_00001.jpg ...
        annotations: folder with tiny_train.csv and tiny_val.csv.
        out: folder to write.
    """
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        with (out / "annotations" / f"tiny_{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["label", "youtube_id", "time_start", "time_end"])
            path = find_list(annotations, split)
            for clip in read_annotations(path) if path else ():
                files = sorted((frames / clip.label.replace(" ", "_") / clip.name()).iterdir())
                first = (len(files) - FRAMES) // 2
                for label in ORDERS if first >= 0 else ():
                    copy(files[first:], order_of(label, random.Random(clip.name())), out, label, clip.name())
                    table.writerow([label, clip.video, clip.start, clip.end])


def copy(files: list[Path], order: list[int], out: Path, label: str, name: str) -> None:
    """Write the frames of one clip in an order."""
    folder = out / "frames" / label.replace(" ", "_") / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(order, start=1):
        shutil.copyfile(files[index], folder / f"frame_{number:05d}.jpg")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(playback, prog="python -m benchmarks.playback"))
