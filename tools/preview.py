"""A picture of what a recipe trains and evaluates on: python -m tools.preview PRESET [--overrides].

The rows come from the loader of training and evaluation, with their augmentation, mixing and masks. The
picture is written to preview-NAME.png in the folder of runs.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from pipelines.augment import to_device
from pipelines.dataset import Dataset, open_dataset, read_batch
from pipelines.errors import run_cli
from pipelines.files import atomic_write
from pipelines.loader import Batch, TrainLoader
from pipelines.order import keep_units
from tools.fonts import line_of
from train import distributed
from train.build import check
from train.config import Config, FinetuneConfig, MaeConfig
from train.console import parse
from train.distributed import World
from train.finetune import check_labels, mix
from train.mae import masking_of, visible
from train.presets import FINETUNE_PRESETS, MAE_PRESETS, NOT_GIVEN
from train.task import batches_of, create_model, open_validation
from train.words import shown

IMAGES, CLIPS = 12, 8  # rows of a section, at most
FRAMES = 8  # of a clip
IMAGE_SIDE, CLIP_SIDE = 160, 112  # pixels: an image, at least; a clip's frame
GRAY = 128
WIDTH, THIN, GAP, MARGIN = 1952, 4, 16, 24  # pixels: the sheet, at least; between pictures, cards; the border
INK, QUIET = "#111111", "#555555"

Pixels = NDArray[np.uint8]


class Card(NamedTuple):
    """One row of a batch on the sheet."""

    picture: Pixels  # [h, w, 3]
    captions: Sequence[str]  # the class, the source, the view


class Section(NamedTuple):
    """A part of the sheet."""

    title: str
    lines: Sequence[str]  # what it shows
    cards: Sequence[Card]


def preview(config: Config) -> Path:
    """Draw the picture and return its path. Raises UserError if the data does not fit the recipe."""
    check(config)
    world = distributed.start(config.speed.device)
    train, validation = open_dataset(config.data.path, "train"), open_validation(config.data)
    if isinstance(config, FinetuneConfig):
        check_labels(train)
    path = config.run.root / f"preview-{config.run.name.replace('/', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = f"{len(train)} training and {len(validation or ())} evaluated {train.info.kind}s"
    about = f"{config.data.path}: {counts}, {len(train.info.classes)} classes"
    sections = [training(config, train, world)]
    if validation is not None:
        sections.append(evaluation(config, validation, world))
    picture = sheet(f"{config.run.name}: {config.model.name}, {size_text(config)}", about, sections)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="png")
    return path


def size_text(config: Config) -> str:
    """The input of the model."""
    size, frames = f"{config.data.size} x {config.data.size} pixels", config.data.frames
    return size if frames == 1 else f"{frames} frames of {size}, of which {min(frames, FRAMES)} are drawn"


# ---- sections


def training(config: Config, dataset: Dataset, world: World) -> Section:
    """The first rows of step 1, as the model gets them."""
    group = config.data.repeats * (2 if mixes(config) else 1)
    rows = min(max(1, most_rows(config) // group) * group, config.optim.batch)
    loader = TrainLoader(dataset, config.data, config.speed, world, batch=rows, seed=config.run.seed)
    batch = next(iter(loader))
    strips, labels, lines = [batch.pixels], [""] * rows, [augmentation(config)]
    if isinstance(config, MaeConfig):
        strips.append(masked(config, batch, config.run.seed))
        lines.append(f"{config.mask_ratio:.0%} of the mask units are hidden, here in gray")
    elif mixes(config):
        inputs, labels = mixed(config, dataset, batch)
        strips.append(inputs)
        lines.append(f"after mixup ({config.mixup:g}) or cutmix ({config.cutmix:g})")
    title = f"TRAINING: the first {rows} of the {config.optim.batch} rows of step 1"
    return Section(title, with_places(config, lines), cards(dataset, batch, strips, labels))


def evaluation(config: Config, dataset: Dataset, world: World) -> Section:
    """Some samples of the split that is evaluated, from its first to its last, in all of their views."""
    views = config.views if isinstance(config, FinetuneConfig) else (1, 1)
    each = views[0] * views[1]
    samples = min(len(dataset), max(2, most_rows(config) // each))
    every = World(0, len(dataset) // samples, world.device)  # the samples of the first of so many processes
    batch = next(batches_of(config, every, dataset, views, samples))
    side = f"with a side of {config.data.crop:.1%} of the short side"
    lines = [f"the square in the middle, {side}"]
    if each > 1:
        order = "left to right" if config.data.frames == 1 else "top to bottom"
        what = f"{views[0]} start(s) in time x {views[1]} square(s) from edge to edge, {side}"
        lines = [f"{each} views from {order}: {what}; their predictions are averaged"]
    strips = [batch.pixels]
    if isinstance(config, MaeConfig):
        strips.append(masked(config, batch, 0))
        lines.append("the mask of this sample, the same in every evaluation")
    title = f"EVALUATION: {samples} of the {len(dataset)} samples of the split {dataset.split}"
    none = [""] * len(batch.ids)
    return Section(title, with_places(config, lines), cards(dataset, batch, strips, none, each))


def most_rows(config: Config) -> int:
    """The most rows of a section."""
    return IMAGES if config.data.frames == 1 else CLIPS


def mixes(config: Config) -> bool:
    """Whether training mixes samples."""
    return isinstance(config, FinetuneConfig) and (config.mixup > 0 or config.cutmix > 0)


def with_places(config: Config, lines: Sequence[str]) -> list[str]:
    """Sentences about the pictures of a card, which say where each picture is if there are two."""
    places = ("Left", "Right") if config.data.frames == 1 else ("Upper strip", "Lower strip")
    if len(lines) == 1:
        return [f"{lines[0][0].upper()}{lines[0][1:]}."]
    return [f"{place}: {line}." for place, line in zip(places, lines, strict=True)]


def augmentation(config: Config) -> str:
    """What is done to training rows before mixing."""
    data, augment = config.data, config.data.augment
    low, high = data.scale
    parts = [
        f"crop of {low:.0%} to {high:.0%} of the area",
        f"mirrored with probability {data.flip:g}" * (data.flip > 0),
        f"color jitter {augment.jitter:g}" * (augment.jitter > 0),
        f"{augment.layers} x RandAugment ({augment.magnitude:g}, {augment.magnitude_std:g}), each with "
        f"probability {augment.probability:g}" * (augment.layers > 0),
        f"erasing with probability {augment.erase:g}" * (augment.erase > 0),
        f"{data.repeats} rows of each sample" * (data.repeats > 1),
    ]
    return ", ".join(filter(None, parts))


def mixed(config: FinetuneConfig, dataset: Dataset, batch: Batch) -> tuple[Tensor, list[str]]:
    """The rows after mixup and cutmix, and the classes of their labels with shares."""
    classes = words_of(dataset)
    labels = to_device(batch.labels, batch.pixels.device)
    plain = replace(config, smoothing=0.0)
    pixels, soft = mix(plain, len(classes), batch.pixels, labels, batch.positions)
    texts = []
    for row in soft.cpu():
        shares, best = (column.tolist() for column in row.topk(min(2, len(classes))))
        pairs = [
            f"{share:.0%} {classes[label]}"
            for share, label in zip(shares, best, strict=True)
            if share >= 0.005
        ]
        texts.append(f"label: {' + '.join(pairs)}")
    return pixels.round().to(torch.uint8), texts


def masked(config: MaeConfig, batch: Batch, seed: int) -> Tensor:
    """The rows with their hidden mask units in gray."""
    with torch.device("meta"):  # only the grid of mask units is needed
        model = create_model(config.data, config.model)
    kept = keep_units(seed, batch.epochs, batch.ids, *masking_of(config.mask_ratio, model))
    channels_first = batch.pixels.movedim(-1, 1)
    seen = visible(model, to_device(kept, batch.pixels.device), channels_first)
    return torch.where(seen, channels_first, GRAY).movedim(1, -1)


def words_of(dataset: Dataset) -> list[str]:
    """The classes of a dataset without codes, which the paths of the sources have."""
    return [re.sub(r" \(n\d{8}\)$", "", name) for name in shown(dataset.info.classes)]


def cards(
    dataset: Dataset, batch: Batch, strips: Sequence[Tensor], labels: Sequence[str], views: int = 1
) -> list[Card]:
    """A card for each valid sample of `views` rows.

    strips: pictures of every row, uint8 as its pixels. labels: the mixed label of every row, or "".
    """
    sources, names = read_batch(dataset.catalogue, ["source"])["source"], [*words_of(dataset), "no class"]
    join, made = beside if batch.pixels.dim() == 4 else below, []
    for first in np.flatnonzero(batch.valid)[::views].tolist():
        rows = range(first, first + views)
        picture = join([strip_of(strip[row]) for row in rows for strip in strips])
        name, source = names[int(batch.labels[first])], sources[int(batch.ids[first])].as_py()  # -1: no class
        view = view_text(dataset, batch, first) + "; the first view" * (views > 1)
        made.append(Card(picture, [text for text in (name, labels[first], source, view) if text]))
    return made


def strip_of(pixels: Tensor) -> Pixels:
    """A picture uint8 [H, W, 3], enlarged if small, or some frames of a clip [T, H, W, 3] side by side."""
    frames, side = pixels.cpu().numpy(), CLIP_SIDE
    if frames.ndim == 3:
        side = frames.shape[1] * max(1, round(IMAGE_SIDE / frames.shape[1]))
        frames = frames[None]
    pictures = [Image.fromarray(frame) for frame in frames[shown_frames(len(frames))]]
    return beside([np.asarray(picture.resize((side, side), Image.Resampling.BOX)) for picture in pictures])


def shown_frames(count: int) -> NDArray[np.int64]:
    """Which of a clip's frames are drawn."""
    return np.linspace(0, count - 1, min(FRAMES, count)).round().astype(np.int64)


def view_text(dataset: Dataset, batch: Batch, row: int) -> str:
    """The crop, the flip and the frames of a row."""
    rows, sample = batch.rows, int(batch.ids[row])
    width, height = rows.windows[row, 2:].tolist()
    text = f"crop {width} x {height} of {dataset.width[sample]} x {dataset.height[sample]}"
    text += ", mirrored" * bool(rows.flips[row]) + ", replaces a damaged sample" * bool(rows.replaced[row])
    if batch.pixels.dim() == 5:
        frames = ", ".join(map(str, rows.frames[row][shown_frames(rows.frames.shape[1])].tolist()))
        text += f"; frames {frames} of {int(dataset.frame_counts(batch.ids)[row])}"
    return text


# ---- the sheet: pictures with captions, in sections


def beside(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures of equal height from left to right."""
    gap = np.full((pictures[0].shape[0], THIN, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)


def below(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures of equal width from top to bottom."""
    return beside([picture.swapaxes(0, 1) for picture in pictures]).swapaxes(0, 1)


def padded(picture: Pixels, height: int, width: int) -> Pixels:
    """The picture with white at its bottom and its right."""
    rows, columns = picture.shape[:2]
    return np.pad(picture, ((0, height - rows), (0, width - columns), (0, 0)), constant_values=255)


def drawn(card: Card) -> Pixels:
    """The picture of a card above its captions."""
    width = card.picture.shape[1]
    captions = [line_of(card.captions[0], 15, INK, width)]
    captions += [line_of(caption, 12, QUIET, width) for caption in card.captions[1:]]
    return below([card.picture, np.concatenate(captions)])


def sheet(title: str, about: str, sections: Sequence[Section]) -> Image.Image:
    """The picture: the cards of a section, which have one width, in as many lines as they need."""
    width = max(WIDTH - 2 * MARGIN, *(card.picture.shape[1] for part in sections for card in part.cards))
    lines = [line_of(title, 26, INK, width), line_of(about, 16, QUIET, width)]
    for section in sections:
        lines += [padded(lines[-1][:0], MARGIN, width), line_of(section.title, 20, INK, width)]
        lines += [line_of(text, 15, QUIET, width) for text in section.lines]
        cards = [drawn(card) for card in section.cards]
        height, each = max(card.shape[0] for card in cards), cards[0].shape[1] + GAP
        across = max(1, (width + GAP) // each)
        for first in range(0, len(cards), across):
            line = np.concatenate([padded(card, height, each) for card in cards[first : first + across]], 1)
            lines += [padded(line[:0, :width], GAP, width), padded(line[:, :width], height, width)]
    return ImageOps.expand(Image.fromarray(np.concatenate(lines)), MARGIN, "white")


def main() -> None:
    print(preview(parse({**MAE_PRESETS, **FINETUNE_PRESETS}, "tools.preview", NOT_GIVEN)))


if __name__ == "__main__":
    run_cli(main)
