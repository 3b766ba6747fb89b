"""What a batch consists of, worked out before a byte is read: samples, frames, windows, flips."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
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
    stride: int = 4  # frames from one clip frame to the next, at stride_fps
    start: int | None = None  # first frame of every clip; None: drawn in training, else centred
    stride_fps: float = 30.0  # frames per second that `stride` and `start` are stated for
    sampling: str = "stride"  # or "segments": one frame from each of `frames` equal parts of the clip
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
    segments = view.sampling == "segments"
    starts = draw(sampler.STREAM_START, view.frames if segments else 1, start_keys)
    counts, stride = catalogue.frame_counts(ids), stored_frames(catalogue.info, view, view.stride)
    if segments:
        frames = sampler.segment_frames(starts, counts, view.frames)
    elif view.start is None:
        frames = sampler.clip_frames_train(starts[:, 0], counts, view.frames, stride)
    else:
        start = sampler.rounded(stored_frames(catalogue.info, view, view.start))
        frames = sampler.clip_frames_from(start, counts, view.frames, stride)
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
    stride = stored_frames(catalogue.info, view, view.stride)
    if view.sampling == "stride" and view.start is None:
        frames = sampler.clip_frames_eval(counts, view.frames, stride, temporal)
    else:
        if view.sampling == "segments":
            same = sampler.segment_frames(0.5, counts, view.frames)
        else:
            start = sampler.rounded(stored_frames(catalogue.info, view, view.start or 0))
            same = sampler.clip_frames_from(start, counts, view.frames, stride)
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


def check_info(info: DatasetInfo, view: ViewSpec, temporal: int = 1) -> None:
    """Raise UserError when a dataset cannot give this view: other kind, too few frames per second, and so on.

    temporal: views in time of an evaluation.
    """
    wanted = "image" if view.frames == 1 else "video"
    if info.kind != wanted:
        raise UserError(
            f"{info.root} holds {info.kind} shards, but this run reads {wanted} input; "
            f"choose a preset {info.kind}-* or shards of the other kind"
        )
    if view.frames == 1:
        return
    if view.sampling == "segments":
        if temporal > 1:
            raise UserError(f"sampling by segments has one view in time, not {temporal}; set --views 1 3")
    elif (stride := stored_frames(info, view, view.stride)) < 1:
        rate = stored_frames(info, view, 1)
        raise UserError(
            f"{info.root} has {info.fps or 30:g} frames per second, and stride {view.stride} at "
            f"{view.stride_fps:g} would be {float(stride):.3g} of its frames; pack it at "
            f"{view.stride_fps / view.stride:g} or more (--fps), or set data.stride to {math.ceil(1 / rate)}"
        )


def stored_frames(info: DatasetInfo, view: ViewSpec, frames: int) -> Fraction:
    """`frames` at view.stride_fps as frames of the dataset, whose rate is 30 where none is recorded."""
    return frames * Fraction(str(info.fps or 30)) / Fraction(str(view.stride_fps))


def check_view(catalogue: Catalogue, view: ViewSpec, temporal: int = 1) -> None:
    """Raise UserError when the dataset cannot give this view, or there is nothing to read."""
    check_info(catalogue.info, view, temporal)
    if len(catalogue) == 0:
        root = catalogue.info.root
        raise UserError(f"{root} has no readable {catalogue.split} sample; {catalogue.parquet} says why")
    if view.interpolation not in FILTERS:
        raise UserError(f"unknown interpolation {view.interpolation!r}; choose {', '.join(FILTERS)}")


def clip_notes(catalogue: Catalogue, view: ViewSpec) -> list[str]:
    """Sentences about how clips are taken: the stride in time, clips that are too short; none for images."""
    if view.frames == 1:
        return []
    return [note for note in (rate_note(catalogue.info, view), short_clip_note(catalogue, view)) if note]


def rate_note(info: DatasetInfo, view: ViewSpec) -> str:
    """How the stride converts to the dataset's frame rate; empty where the two rates are the same."""
    if view.sampling == "segments" or info.fps == view.stride_fps:
        return ""
    stride, seconds = stored_frames(info, view, view.stride), view.stride / view.stride_fps
    rate = f"{info.fps:g}" if info.fps else "30 (assumed: none is recorded)"
    whole = "" if stride.denominator == 1 else ", each rounded to a whole frame"
    return (
        f"stride {view.stride} at {view.stride_fps:g} frames per second is stride {float(stride):.4g} at the "
        f"dataset's {rate}{whole}: {seconds:.3g} s from frame to frame, {seconds * view.frames:.3g} s for "
        f"{view.frames}"
    )


def short_clip_note(catalogue: Catalogue, view: ViewSpec) -> str:
    """One sentence about the clips too short for the view, empty when there are none."""
    if view.sampling == "segments":
        span, what, how = view.frames, f"{view.frames} frames", "some of their frames repeat"
    else:
        stride = stored_frames(catalogue.info, view, view.stride)
        span = sampler.rounded((view.frames - 1) * stride) + 1
        what = f"{view.frames} frames x stride {float(stride):.4g} ({span} frames)"
        how = "their stride shrinks to what fits, then the last frame repeats"
    short = int((np.diff(catalogue.first_frame) < span).sum())
    clips = f"{short} of {len(catalogue)} {catalogue.split} clips"
    return f"{clips} are shorter than {what}: {how}" if short else ""
