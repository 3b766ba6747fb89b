"""Views: which frames of a sample each row of a batch shows, and its crop and flip."""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines import order
from pipelines.config import DataConfig, Range
from pipelines.dataset import Dataset, DatasetInfo
from pipelines.errors import UserError

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Rows(NamedTuple):
    """The b rows of a batch, decided before a byte is read. Rows of one sample are consecutive."""

    ids: Ints  # [b] the samples
    epochs: Ints  # [b] -1 in evaluation; with r repeats the k-th row of a sample has epoch * r + k
    positions: Ints  # [b] step * global batch + row of the global batch; -1 in evaluation
    valid: Bools  # [b] False in evaluation: padding of a last batch, or a damaged sample
    frames: Ints  # [b, T] indices into the sample's frames
    windows: NDArray[np.int32]  # [b, 4] crop: x, y, width, height in pixels of the stored frame
    flips: Bools  # [b] mirror left to right
    replaced: Bools  # [b] True where this sample replaces a damaged one


class Layout(NamedTuple):
    """How the batches of a process are made."""

    rows: int  # of a batch
    copies: int  # consecutive rows that share their decoded frames
    unit: int  # consecutive rows that are replaced together when a frame of one is damaged
    batches: int = 1 << 62  # of the process; training does not end


def train_rows(dataset: Dataset, config: DataConfig, seed: int, ids: Ints, epochs: Ints) -> Rows:
    """Rows with random views of samples ids [b] in epochs [b]; each row has its own draws."""
    boxes = order.uniform(seed, epochs, ids, order.STREAM_WINDOW, 22)
    windows = random_resized_crop(boxes, dataset.width[ids], dataset.height[ids], config.scale, config.ratio)
    flips = order.uniform(seed, epochs, ids, order.STREAM_FLIP, 1)[:, 0] < config.flip
    frames = train_frames(dataset, config, seed, ids, epochs)
    true = np.ones(len(ids), bool)
    return Rows(ids, epochs, np.full(len(ids), -1), true, frames, windows, flips, ~true)


def train_frames(dataset: Dataset, config: DataConfig, seed: int, ids: Ints, epochs: Ints) -> Ints:
    """The frames [b, T] of training rows: drawn, or from `clip_start` on."""
    counts = dataset.frame_counts(ids)
    keys = epochs - epochs % config.repeats if config.same_clip else epochs
    segments = config.sampling == "segments"
    draws = order.uniform(seed, keys, ids, order.STREAM_START, config.frames if segments else 1)
    if segments:
        return segment_frames(draws, counts, config.frames)
    offsets = clip_offsets(counts, config.frames, stored_frames(dataset.info, config, config.stride))
    last = last_starts(counts, offsets)
    if config.clip_start is None:
        starts = np.floor(draws[:, 0] * (last + 1)).astype(np.int64)
    else:
        starts = np.minimum(rounded(stored_frames(dataset.info, config, config.clip_start)), last)
    return frames_from(starts, counts, offsets)


def eval_rows(dataset: Dataset, config: DataConfig, views: tuple[int, int], ids: Ints, valid: Bools) -> Rows:
    """The fixed views of samples ids [n]: n * temporal * spatial rows; `views` is (temporal, spatial)."""
    temporal, spatial = views
    windows = eval_windows(dataset.width[ids], dataset.height[ids], config.crop, spatial)
    frames = eval_frames(dataset, config, ids, temporal)
    rows = len(ids) * temporal * spatial
    none = np.full(rows, order.EVALUATION, np.int64)
    return Rows(
        ids=np.repeat(ids, temporal * spatial),
        epochs=none,
        positions=none,
        valid=np.repeat(valid, temporal * spatial),
        frames=np.repeat(frames, spatial, axis=1).reshape(rows, config.frames),
        windows=np.tile(windows, (1, temporal, 1)).reshape(rows, 4),
        flips=np.zeros(rows, bool),
        replaced=np.zeros(rows, bool),
    )


def eval_frames(dataset: Dataset, config: DataConfig, ids: Ints, views: int) -> Ints:
    """The frames [n, views, T] of samples in evaluation.

    One view is central; several start evenly from the clip's first frame to the last start. Segments and
    `eval_clip_start` give the same frames in every view.
    """
    counts = dataset.frame_counts(ids)
    if config.sampling == "segments":
        return np.repeat(segment_frames(0.5, counts, config.frames)[:, None], views, axis=1)
    offsets = clip_offsets(counts, config.frames, stored_frames(dataset.info, config, config.stride))
    last = last_starts(counts, offsets)[:, None]
    if config.eval_clip_start is None:
        starts = np.floor(last * places_of(views)).astype(np.int64)
    else:
        start = rounded(stored_frames(dataset.info, config, config.eval_clip_start))
        starts = np.repeat(np.minimum(start, last), views, axis=1)
    return frames_from(starts, counts[:, None], offsets[:, None])


def replace_rows(rows: Rows, places: Ints, others: Rows) -> Rows:
    """Rows with `others` at these places, where they keep their positions and are marked as replaced."""
    others = others._replace(positions=rows.positions[places], replaced=np.ones(len(places), bool))
    whole = Rows._make(column.copy() for column in rows)
    for column, other in zip(whole, others, strict=True):
        column[places] = other
    return whole


def blank_rows(count: int, frames: int = 1) -> Rows:
    """Rows of sample 0, its first frame, no crop: for tests and for trying a model."""
    zeros, false = np.zeros(count, np.int64), np.zeros(count, bool)
    frames_, windows = np.zeros((count, frames), np.int64), np.zeros((count, 4), np.int32)
    return Rows(zeros, zeros, np.arange(count), ~false, frames_, windows, false, false)


# ---- space


def random_resized_crop(draws: Floats, width: Ints, height: Ints, scale: Range, ratio: Range) -> np.ndarray:
    """Crop windows int32 [n, 4] as (x, y, width, height), in pixels, of images width x height [n].

    `draws` is float [n, 22]: ten tries of (area, log aspect ratio), then the place. The distribution is
    that of torchvision's RandomResizedCrop (Szegedy et al. 2015), with its central fallback.
    """
    area, aspect = draws[:, 0:20:2], draws[:, 1:20:2]
    area = (scale[0] + area * (scale[1] - scale[0])) * (width * height)[:, None]
    aspect = np.exp(np.log(ratio[0]) + aspect * (np.log(ratio[1]) - np.log(ratio[0])))
    tried_w, tried_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (tried_w > 0) & (tried_w <= width[:, None]) & (tried_h > 0) & (tried_h <= height[:, None])
    first = fits.argmax(axis=1)[:, None]
    w = np.take_along_axis(tried_w, first, axis=1)[:, 0]
    h = np.take_along_axis(tried_h, first, axis=1)[:, 0]
    x, y = np.floor(draws[:, 20] * (width - w + 1)), np.floor(draws[:, 21] * (height - h + 1))
    drawn = np.stack([x, y, w, h], axis=1).astype(np.int32)
    return np.where(fits.any(axis=1)[:, None], drawn, widest_center(width, height, ratio))


def widest_center(width: Ints, height: Ints, ratio: Range) -> np.ndarray:
    """The largest central window within the aspect ratios, int32 [n, 4] as (x, y, width, height)."""
    w = np.minimum(width, np.rint(height * ratio[1]))
    h = np.minimum(height, np.rint(width / ratio[0]))
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=1).astype(np.int32)


def eval_windows(width: Ints, height: Ints, fraction: float, views: int) -> np.ndarray:
    """Square windows of side `fraction` x short side, int32 [n, views, 4] as (x, y, width, height).

    One view is central; several are spread evenly along the long side, from edge to edge.
    """
    side = np.maximum(1, np.rint(np.minimum(width, height) * fraction)).astype(np.int64)[:, None]
    free_x, free_y = width[:, None] - side, height[:, None] - side
    wide, place = (width >= height)[:, None], places_of(views)
    x = np.rint(free_x * np.where(wide, place, 0.5))
    y = np.rint(free_y * np.where(wide, 0.5, place))
    side = np.broadcast_to(side, x.shape)
    return np.stack([x, y, side, side], axis=2).astype(np.int32)


def places_of(views: int) -> Floats:
    """Where evaluation views are, as shares of the free range: the middle, or evenly from end to end."""
    return np.full(1, 0.5) if views == 1 else np.linspace(0, 1, views)


# ---- time


def stored_frames(info: DatasetInfo, config: DataConfig, frames: int) -> Fraction:
    """`frames` at config.stride_fps as frames of the dataset, whose rate is 30 where none is recorded."""
    return frames * Fraction(str(info.fps or 30)) / Fraction(str(config.stride_fps))


def rounded(value: Fraction | int) -> int:
    """The nearest integer; halves round up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def clip_offsets(counts: Ints, frames: int, stride: Fraction | int) -> Ints:
    """Each clip frame's distance from the first, [n, frames], in clips of counts [n] frames.

    Frame k is at k * stride, rounded to a whole frame, halves up. In a clip that is too short for that, the
    stride is reduced to the largest whole number that fits, at least 1.
    """
    steps = np.arange(frames, dtype=np.int64)
    whole = np.array([rounded(k * stride) for k in range(frames)], np.int64)
    shrunk = np.maximum(1, (counts - 1) // max(1, frames - 1))
    return np.where((counts > whole[-1])[:, None], whole, shrunk[:, None] * steps)


def last_starts(counts: Ints, offsets: Ints) -> Ints:
    """The last first frame [n] from which a whole clip fits, 0 if none does; `offsets` [n, frames]."""
    return np.maximum(0, counts - 1 - offsets[:, -1])


def frames_from(starts: Ints, counts: Ints, offsets: Ints) -> Ints:
    """Frame indices starts + offsets [..., frames]; beyond the clip's last frame, that one repeats."""
    return np.minimum(starts[..., None] + offsets, counts[..., None] - 1).astype(np.int64)


def segment_frames(places: Floats | float, counts: Ints, frames: int) -> Ints:
    """Frame indices [n, frames]: one from each of `frames` equal parts of clips of counts [n] frames.

    places: where in its part each frame is, in [0, 1): [n, frames], or 0.5 for the middles.
    """
    chosen = np.floor((np.arange(frames) + places) * counts[:, None] / frames).astype(np.int64)
    return np.minimum(chosen, counts[:, None] - 1)


# ---- checks and notes


def check_info(info: DatasetInfo, config: DataConfig, temporal: int = 1) -> None:
    """Raise UserError when a dataset cannot give these views, such as too few frames per second.

    temporal: views in time of an evaluation.
    """
    wanted = "image" if config.frames == 1 else "video"
    if info.kind != wanted:
        raise UserError(
            f"{info.root} contains {info.kind} shards, but this run reads {wanted} input; "
            f"choose a preset {info.kind}-* or shards of the other kind"
        )
    if config.frames == 1:
        return
    if config.sampling == "segments":
        if temporal > 1:
            raise UserError(f"sampling by segments has one temporal view, not {temporal}; set --views 1 3")
    elif (stride := stored_frames(info, config, config.stride)) < 1:
        rate = stored_frames(info, config, 1)
        raise UserError(
            f"{info.root} has {info.fps or 30:g} frames per second, and stride {config.stride} at "
            f"{config.stride_fps:g} would be {float(stride):.3g} of its frames; pack it at "
            f"{config.stride_fps / config.stride:g} or more (--fps), or set data.stride to "
            f"{math.ceil(1 / rate)}"
        )


def check_dataset(dataset: Dataset, config: DataConfig, temporal: int = 1) -> None:
    """`check_info`, and raise UserError for a split without samples."""
    check_info(dataset.info, config, temporal)
    if len(dataset) == 0:
        root = dataset.info.root
        raise UserError(f"{root} has no readable {dataset.split} sample; {dataset.catalogue} says why")


def clip_notes(dataset: Dataset, config: DataConfig) -> list[str]:
    """Sentences about the stride in time and about clips that are too short; none for images."""
    if config.frames == 1:
        return []
    return [note for note in (rate_note(dataset.info, config), short_clip_note(dataset, config)) if note]


def rate_note(info: DatasetInfo, config: DataConfig) -> str:
    """How the stride converts to the dataset's frame rate; empty where the two rates are the same."""
    if config.sampling == "segments" or info.fps == config.stride_fps:
        return ""
    stride, seconds = stored_frames(info, config, config.stride), config.stride / config.stride_fps
    rate = f"{info.fps:g}" if info.fps else "30 (assumed: none is recorded)"
    whole = "" if stride.denominator == 1 else ", each rounded to a whole frame"
    return (
        f"stride {config.stride} at {config.stride_fps:g} frames per second is stride {float(stride):.4g} at "
        f"the dataset's {rate}{whole}: {seconds:.3g} s from frame to frame, {seconds * config.frames:.3g} s "
        f"for {config.frames}"
    )


def short_clip_note(dataset: Dataset, config: DataConfig) -> str:
    """One sentence about the clips that are too short for these views, empty when there are none."""
    if config.sampling == "segments":
        span, what, how = config.frames, f"{config.frames} frames", "some of their frames repeat"
    else:
        stride = stored_frames(dataset.info, config, config.stride)
        span = rounded((config.frames - 1) * stride) + 1
        what = f"{config.frames} frames x stride {float(stride):.4g} ({span} frames)"
        how = "their stride is reduced to what fits, then the last frame is repeated"
    short = int((np.diff(dataset.first_frame) < span).sum())
    clips = f"{short} of {len(dataset)} {dataset.split} clips"
    return f"{clips} are shorter than {what}: {how}" if short else ""
