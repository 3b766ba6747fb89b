"""What a batch consists of, worked out before a byte is read: samples, frames, windows, flips."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines import sampler
from pipelines.augment import Augment
from pipelines.catalogue import Catalogue, DatasetInfo
from pipelines.errors import UserError
from pipelines.graph import FILTERS, Feed

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ViewSpec:
    """How a sample is cut in time and space."""

    size: int  # side of the square output in pixels
    frames: int = 1  # per clip; 1: images
    stride: int = 4  # source frames from one clip frame to the next
    start: int | None = None  # first source frame of every clip; None: drawn in training, else centred
    scale: tuple[float, float] = (0.08, 1.0)  # area share of the random resized crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its aspect ratios
    flip: float = 0.5  # probability of a left-right mirror
    interpolation: str = "triangular"  # a key of graph.FILTERS
    crop_fraction: float = 224 / 256  # evaluation: side of the square window / short side of the source
    repeats: int = 1  # training rows per sample drawn (repeated sampling); they stand side by side
    same_clip: bool = False  # the repeats of a clip share its frames, so that one decode serves all
    augment: Augment = field(default_factory=Augment)

    @property
    def copies(self) -> int:
        """How many training rows one decoded frame serves."""
        return self.repeats if self.same_clip or self.frames == 1 else 1


class Plan(NamedTuple):
    """One batch of b rows."""

    ids: Ints  # [b]
    epochs: Ints  # [b], see Batch
    valid: Bools  # [b]
    frames: Ints  # [b, T] indices into the sample's frames
    windows: NDArray[np.int32]  # [b, 4] x, y, width, height
    flips: Bools  # [b]
    replaced: Bools  # [b] True where a damaged sample was drawn and another stands in


def train_plan(catalogue: Catalogue, view: ViewSpec, seed: int, ids: Ints, epochs: Ints) -> Plan:
    """The random windows and flips of samples ids [b] in epochs [b]; each row is drawn by itself."""

    def draw(stream: int, count: int, keys: Ints = epochs) -> NDArray[np.float64]:
        return sampler.uniform(seed, keys, ids, stream, count)

    start_keys = epochs - epochs % view.repeats if view.same_clip else epochs
    starts = draw(sampler.STREAM_START, 1, start_keys)[:, 0]
    counts = catalogue.frame_counts(ids)
    if view.start is None:
        frames = sampler.clip_frames_train(starts, counts, view.frames, view.stride)
    else:
        frames = sampler.clip_frames_from(view.start, counts, view.frames, view.stride)
    width, height = catalogue.width[ids], catalogue.height[ids]
    crops = draw(sampler.STREAM_WINDOW, 22)
    windows = sampler.random_resized_crop(crops, width, height, view.scale, view.ratio)
    flips = draw(sampler.STREAM_FLIP, 1)[:, 0] < view.flip
    good = np.ones(len(ids), bool)
    return Plan(ids, epochs, good, frames, windows, flips, ~good)


def eval_plan(
    catalogue: Catalogue, view: ViewSpec, ids: Ints, valid: Bools, temporal: int, spatial: int
) -> Plan:
    """The fixed views of samples [n]: n * temporal * spatial rows, a sample's views side by side."""
    counts, views = catalogue.frame_counts(ids), temporal * spatial
    if view.start is None:
        frames = sampler.clip_frames_eval(counts, view.frames, view.stride, temporal)
    else:
        same = sampler.clip_frames_from(view.start, counts, view.frames, view.stride)
        frames = np.repeat(same[:, None], temporal, axis=1)
    windows = sampler.eval_windows(catalogue.width[ids], catalogue.height[ids], view.crop_fraction, spatial)
    rows = len(ids) * views
    return Plan(
        np.repeat(ids, views),
        np.full(rows, sampler.EVALUATION, np.int64),
        np.repeat(valid, views),
        np.repeat(frames, spatial, axis=1).reshape(rows, view.frames),
        np.tile(windows, (1, temporal, 1)).reshape(rows, 4),
        np.zeros(rows, bool),
        np.zeros(rows, bool),
    )


def repeated(positions: Ints, repeats: int, order: sampler.Order) -> tuple[Ints, ...]:
    """Ids [b] and epochs [b] of rows at stream positions [b] when each sample fills `repeats` rows.

    The k-th row of a sample in epoch e counts as its epoch e * repeats + k, which keys all its draws.
    """
    epochs, ids = order(positions // repeats)
    return ids, epochs * repeats + positions % repeats


def feed_of(catalogue: Catalogue, plan: Plan, copies: int) -> Feed:
    """Read the frames to decode, sample after sample; `copies` rows side by side share theirs.

    A damaged one is empty, see `Catalogue.read`.
    """
    windows = plan.windows.reshape(-1, copies, 4)
    low = windows[..., :2].min(axis=1)
    high = (windows[..., :2] + windows[..., 2:]).max(axis=1)
    boxes = np.concatenate([low, high - low], axis=1)
    inner = np.concatenate([windows[..., :2] - low[:, None], windows[..., 2:]], axis=2)
    frames = plan.frames[::copies]
    jpegs = catalogue.read(plan.ids[::copies], frames)
    flips = plan.flips.reshape(-1, copies)
    per_frame = [np.repeat(part, frames.shape[1], axis=0) for part in (boxes, inner, flips)]
    return Feed(jpegs, *per_frame)


def check_kind(info: DatasetInfo, frames: int) -> None:
    """Raise UserError when images are asked of clips, or clips of images."""
    wanted = "image" if frames == 1 else "video"
    if info.kind != wanted:
        raise UserError(
            f"{info.root} holds {info.kind} shards, but this run reads {wanted} input; "
            f"choose a preset {info.kind}-* or shards of the other kind"
        )


def check_view(catalogue: Catalogue, view: ViewSpec) -> None:
    """Raise UserError when the dataset is of the other kind, or there is nothing to read."""
    check_kind(catalogue.info, view.frames)
    if len(catalogue) == 0:
        root = catalogue.info.root
        raise UserError(f"{root} has no readable {catalogue.split} sample; {catalogue.parquet} says why")
    if view.interpolation not in FILTERS:
        raise UserError(f"unknown interpolation {view.interpolation!r}; choose {', '.join(FILTERS)}")


def short_clip_note(catalogue: Catalogue, view: ViewSpec) -> str | None:
    """One sentence about the clips too short for the view, or None when there are none."""
    span = (view.frames - 1) * view.stride + 1
    short = 0 if view.frames == 1 else int((np.diff(catalogue.first_frame) < span).sum())
    if short == 0:
        return None
    return (
        f"{short} of {len(catalogue)} {catalogue.split} clips are shorter than {view.frames} frames x stride "
        f"{view.stride} ({span} frames): their stride shrinks to what fits, then the last frame repeats"
    )
