"""Small packed datasets and small configurations for the tests of training."""

import csv
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tools.pack import ClipOptions, ImageOptions, pack_clips, pack_images
from train.config import Config, MaeConfig, flatten, to_dict
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("dark things", "light things")


def picture(label: int, seed: int, size: int = 72) -> bytes:
    """A noisy JPEG; its brightness shows its class."""
    noise = np.random.default_rng(seed).integers(0, 90, (9, 9, 3)) + 120 * label
    image = Image.fromarray(noise.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_images(root: Path, train: int = 20, val: int = 7) -> Path:
    """Pack `train` + `val` pictures per class; neither number is a multiple of the tests' batch sizes."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / "source" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.JPEG").write_bytes(
                    picture(label, 1000 * label + i + (500 if split == "val" else 0))
                )
    assert pack_images(root / "source", root / "images", ImageOptions(workers=1, shard_size=16)) == 0
    return root / "images"


def make_clips(root: Path, train: int = 10, val: int = 3, frames: int = 20) -> Path:
    """Pack clips of `frames` frames in the Tiny-Kinetics-400 layout."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        with (root / "annotations" / f"tiny_{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("label", "youtube_id", "time_start", "time_end", "split", "is_cc"))
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    rows.writerow((name, f"-{split}{label}{i}", 3, 13, split, 0))
                    folder = root / "frames" / name.replace(" ", "_") / f"-{split}{label}{i}_000003_000013"
                    folder.mkdir(parents=True)
                    for f in range(frames):
                        seed = 10_000 * label + 100 * i + f + (5000 if split == "val" else 0)
                        (folder / f"frame_{f + 1:05d}.jpg").write_bytes(picture(label, seed))
    options = ClipOptions(workers=1, shard_size=8)
    assert pack_clips(root / "annotations", root / "clips", options, frames=root / "frames") == 0
    return root / "clips"


def small(preset: str, data: Path, runs: Path, name: str, **optim: object) -> Config:
    """A preset that runs in seconds: 64 pixels, batch 12, rows every 3 steps, a checkpoint every 4."""
    config = {**MAE_PRESETS, **FINETUNE_PRESETS}[preset]
    frames = config.data.frames
    values = {"batch": 12, "lr_batch": 12, "epochs": 3.0, "warmup_epochs": 1.0, **optim}
    if isinstance(config, MaeConfig):
        config = replace(config, health=False)  # a fifth of a short run; see tests/train/test_health.py
    return replace(
        config,
        data=replace(config.data, path=data, size=64, frames=8 if frames > 1 else 1),
        model=replace(config.model, drop_path=0.1),
        optim=replace(config.optim, **values),
        run=replace(config.run, name=name, root=runs, log_every=3, eval_every=5, checkpoint_every=4),
        speed=replace(config.speed, micro_batch=6, device="cpu", threads=1),
    )


def arguments(config: Config) -> list[str]:
    """The same configuration as command-line overrides of its preset."""
    words = []
    for key, value in flatten(to_dict(config)).items():
        if key != "kind":
            values = value if isinstance(value, list) else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


def module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", name, *words]


def call(name: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a module to its end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(module(name, *words), cwd=cwd, env=env, capture_output=True, text=True, check=False)
