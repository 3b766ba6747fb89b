"""Generate the demo's data: pictures whose class is their texture and hue, clips whose class is their motion.

    python -m tools.demo_data --out data/demo

Every picture and clip is drawn from its own seed; training and validation share nothing. The folders have the
layout of ImageNet and of Tiny-Kinetics-400.
"""

import csv
from collections.abc import Iterator
from colorsys import hsv_to_rgb
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from pipelines.errors import run_cli
from pipelines.files import atomic_write
from tools.packing import PackOptions, writing_to

IMAGE_SIDE = 128
IMAGES = {"train": 50, "val": 25}  # per class
CLIP_SIDE = 80
CLIP_FRAMES = 40
CLIPS = {"train": 64, "val": 20}  # per class
QUALITY = 85

Draw = np.random.Generator


# ---- pictures: class = texture and a range of hues -------------------------------------------------------

TEXTURES = {
    "checks": lambda y, x: np.sign(np.sin(y) * np.sin(x)),
    "dots": lambda y, x: np.where(np.cos(y) + np.cos(x) > 0.9, 1.0, -1.0),
    "rings": lambda y, x: np.sin(np.hypot(y, x)),
    "stripes": lambda y, x: np.sin(y),
}
HUES = {"blue": 0.6, "orange": 0.08}  # centers; each picture deviates from them
PICTURE_CLASSES = [f"{hue}_{texture}" for hue in HUES for texture in TEXTURES]


def draw_picture(draw: Draw, name: str) -> np.ndarray:
    """One picture of class `name`, uint8 [128, 128, 3]: a rotated and shifted texture in two colors."""
    hue, texture = name.split("_")
    angle = draw.uniform(-0.4, 0.4)
    period = draw.uniform(14, 24)
    center = draw.uniform(0.2, 0.8, 2) * IMAGE_SIDE
    y, x = np.mgrid[:IMAGE_SIDE, :IMAGE_SIDE] - center[:, None, None]
    turned = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    weight = 0.5 + 0.5 * TEXTURES[texture](*(2 * np.pi / period * np.stack(turned)))
    color = (HUES[hue] + draw.normal(0, 0.05)) % 1, draw.uniform(0.5, 1), draw.uniform(0.5, 1)
    ink = np.array(hsv_to_rgb(*color))
    paper = np.full(3, draw.uniform(0.1, 0.9)) + draw.uniform(-0.1, 0.1, 3)
    light = draw.uniform(0.7, 1.1) + 0.2 * _smooth(draw, IMAGE_SIDE, 40)
    picture = (paper + (ink - paper) * weight[..., None]) * light[..., None]
    return _uint8(picture + draw.normal(0, 0.04, picture.shape))


def _smooth(draw: Draw, side: int, scale: float) -> np.ndarray:
    """Smooth noise [side, side] of unit variance on a torus, its features about `scale` pixels wide."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    spectrum = np.fft.fft2(draw.normal(size=(side, side))) * np.exp(-((frequency * scale) ** 2))
    noise = np.fft.ifft2(spectrum).real
    return (noise - noise.mean()) / noise.std()


def _uint8(picture: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)


# ---- clips: class = motion -------------------------------------------------------------------------------
# A clip is one picture on a torus at offsets that change with time: it rests, drifts, or jumps every few
# frames. In every class, the offset of a single frame is uniform over the torus, so that one frame does not
# show the class. Mirroring a clip does not change its class.

HOPS = {"jumping wildly": 2, "hopping fast": 4, "hopping": 8, "hopping slowly": 16}  # frames between hops
MOTIONS = ["drifting", *HOPS, "standing still"]


def draw_clip(draw: Draw, label: str) -> np.ndarray:
    """One clip of motion `label`, uint8 [40, 80, 80, 3]; drifting is 1 to 2 pixels per frame."""
    picture, time = _patchwork(draw), np.arange(CLIP_FRAMES)
    offsets = np.tile(draw.uniform(0, CLIP_SIDE, 2), (CLIP_FRAMES, 1))
    if label == "drifting":
        angle = draw.uniform(0, 2 * np.pi)
        offsets += np.outer(time * draw.uniform(1, 2), [np.sin(angle), np.cos(angle)])
    if label in HOPS:
        places = draw.uniform(0, CLIP_SIDE, (CLIP_FRAMES, 2))
        offsets = places[(time + draw.integers(HOPS[label])) // HOPS[label]]
    return np.stack([np.roll(picture, tuple(offset), (0, 1)) for offset in np.rint(offsets).astype(int)])


def _patchwork(draw: Draw) -> np.ndarray:
    """Patches of many colors, uint8 [80, 80, 3]; opposite edges meet."""
    channels = [_smooth(draw, CLIP_SIDE, draw.uniform(16, 28)) for _ in range(3)]
    return _uint8(1 / (1 + np.exp(-2.5 * np.stack(channels, -1))))


# ---- files -----------------------------------------------------------------------------------------------


def demo_data(out: Path, workers: int | None = None) -> None:
    """Generate the demo's pictures and clips: the same files on every machine with the same lock.

    Args:
        out: folder to write images/ and clips/ to.
        workers: processes; default: one per core.
    """
    processes = PackOptions(workers=workers).processes
    with writing_to(out):
        clips = out / "clips"
        (clips / "annotations").mkdir(parents=True, exist_ok=True)
        names = {split: list(_clip_names(split)) for split in CLIPS}
        jobs = [(out / "images", split, name) for split in IMAGES for name in PICTURE_CLASSES]
        films = [(clips, split, label, names[split]) for split in CLIPS for label in MOTIONS]
        with get_context("spawn").Pool(processes) as pool:
            pool.starmap(_write_clips, films, chunksize=1)
            pool.starmap(_write_images, jobs, chunksize=1)
        for split in CLIPS:
            _annotate(clips / "annotations" / f"tiny_{split}.csv", split, names[split])


def _draw(*key: str | int) -> Draw:
    """The random generator of one picture or clip."""
    return np.random.default_rng(list("/".join(map(str, key)).encode()))


def _write_images(root: Path, split: str, name: str) -> None:
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES[split]):
        picture = draw_picture(_draw(split, name, number), name)
        Image.fromarray(picture).save(folder / f"{split}_{name}_{number:04d}.JPEG", quality=QUALITY)


def _clip_names(split: str) -> Iterator[tuple[str, str, int, int]]:
    """(label, id, start, end) of every clip; ids look like YouTube's, some with a leading - or _."""
    letters = np.array(list("-_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"))
    draw = _draw(split, "names")
    for label in MOTIONS:
        for number in range(CLIPS[split]):
            video = "".join(draw.choice(letters, 11))
            start = int(draw.integers(0, 600))
            yield label, ("-_"[number % 2] if number < 4 else "") + video[number < 4 :], start, start + 10


def _write_clips(root: Path, split: str, label: str, names: list[tuple[str, str, int, int]]) -> None:
    mine = [name for name in names if name[0] == label]
    for number, (_, video, start, end) in enumerate(mine):
        folder = root / "data_30fps_frames" / label.replace(" ", "_") / f"{video}_{start:06d}_{end:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate(draw_clip(_draw(split, label, number), label)):
            Image.fromarray(frame).save(folder / f"frame_{index + 1:05d}.jpg", quality=QUALITY)


def _annotate(path: Path, split: str, names: list[tuple[str, str, int, int]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
        writer.writerows([*name, split, 0] for name in names)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(demo_data))
