"""Who sees what, when: pure functions of (seed, epoch, sample id) and of a position in the sample stream.

No generator object and no table is kept. The batch of any step, on any number of processes, follows
from the step's number alone, so resuming in the middle of an epoch is exact and costs nothing.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
EVALUATION = -1  # the "epoch" under which evaluation draws

Range = tuple[float, float]  # from, to
Order = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # positions [n] -> epochs [n], ids [n]

# What a draw is for; two streams of one sample are independent.
STREAM_WINDOW, STREAM_FLIP, STREAM_START, STREAM_MASK, STREAM_ORDER = range(5)
STREAM_JITTER, STREAM_ERASE, STREAM_SHARDS, STREAM_NEARBY, STREAM_REPLACE = range(5, 10)
STREAM_RAND = 100  # one stream per layer of RandAugment from here on


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014) on uint64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys_of(*parts: np.ndarray | int) -> np.ndarray:
    """Hash integers (broadcast against each other; negatives too) to uint64 keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix(key + GOLDEN + mix(np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64)))
    return key


def uniform(seed: int, epochs: np.ndarray, ids: np.ndarray, stream: int, count: int) -> np.ndarray:
    """Draws in [0, 1), float64 [n, count], of each sample [n] in its epoch [n]."""
    keys = keys_of(seed, stream, epochs, ids)
    counters = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (mix(keys[:, None] + counters) >> np.uint64(11)) * 2.0**-53


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Send each of `values` [n] in [0, size) through the bijection of [0, size) that its key [n] names.

    A Feistel network on the next even number of bits, walked along its cycle until the value falls
    below `size` (Black and Rogaway 2002): a permutation without a table.
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    out = values.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = feistel(out[todo], half, keys[todo])
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def feistel(values: np.ndarray, half: int, keys: np.ndarray, rounds: int = 6) -> np.ndarray:
    """A keyed bijection of the integers of 2 * half bits."""
    low = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & low
    for constant in np.arange(1, rounds + 1, dtype=np.uint64) * GOLDEN:
        left, right = right, left ^ (mix(keys + right + constant) & low)
    return (left << np.uint64(half)) | right


def sample_at(positions: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs [n] and sample ids [n] at positions [n] of the endless stream over `size` samples.

    Every epoch is its own permutation, so each sample comes exactly once per epoch; batches may
    straddle two epochs.
    """
    epochs, places = np.divmod(np.asarray(positions, np.int64), size)
    return epochs, permute(places, size, keys_of(seed, STREAM_ORDER, epochs))


def local_order(shards: np.ndarray, seed: int, window: int) -> Order:
    """An order that reads nearly in sequence, for disks and network file systems: positions -> (epochs, ids).

    Shards come in random order, and what they hold is shuffled within windows of `window` samples. As
    exact and as stateless as `sample_at`. `shards` [N] is the shard of every sample, ascending.
    """
    starts = np.concatenate([[0], np.flatnonzero(np.diff(shards)) + 1, [len(shards)]])
    lengths, size, count = np.diff(starts), len(shards), len(starts) - 1

    @lru_cache(maxsize=2)
    def shard_order(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permute(np.arange(count), count, keys_of(seed, STREAM_SHARDS, np.full(count, epoch)))
        return order, np.concatenate([[0], np.cumsum(lengths[order])])

    def of_epoch(epoch: int, places: np.ndarray) -> np.ndarray:
        order, ends = shard_order(epoch)
        windows, within = np.divmod(places, window)
        sizes = np.minimum(window, size - windows * window)
        keys = keys_of(seed, STREAM_NEARBY, epoch, windows)
        for length in np.unique(sizes):
            rows = sizes == length
            within[rows] = permute(within[rows], int(length), keys[rows])
        places = windows * window + within
        slot = np.searchsorted(ends, places, side="right") - 1
        return starts[order[slot]] + places - ends[slot]

    def order(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, places = np.divmod(np.asarray(positions, np.int64), size)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = of_epoch(int(epoch), places[epochs == epoch])
        return epochs, ids

    return order


def batch_positions(step: int, global_batch: int, rank: int, world: int, accumulate: int) -> np.ndarray:
    """Stream positions of this rank's micro batches at `step`, int64 [accumulate, micro].

    Over all ranks they are step * global_batch + [0, global_batch) at any number of processes.
    """
    micro = global_batch // (world * accumulate)
    first = step * global_batch + rank * accumulate * micro
    return first + np.arange(accumulate * micro, dtype=np.int64).reshape(accumulate, micro)


def eval_ids(size: int, rank: int, world: int) -> np.ndarray:
    """The ids [n] this rank evaluates; over the ranks each id exactly once."""
    return np.arange(rank, size, world, dtype=np.int64)


def keep_units(seed: int, epochs: np.ndarray, ids: np.ndarray, units: int, kept: int) -> np.ndarray:
    """Which of a sample's mask units stay visible, int64 [n, kept], ascending; uniform over all subsets.

    Evaluation passes epoch -1, so that its masks never change.
    """
    draws = uniform(seed, epochs, ids, STREAM_MASK, units)
    return np.sort(np.argpartition(draws, kept - 1, axis=1)[:, :kept], axis=1).astype(np.int64)


def random_resized_crop(
    draws: np.ndarray, width: np.ndarray, height: np.ndarray, scale: Range, ratio: Range
) -> np.ndarray:
    """Crop windows int32 [n, 4] as (x, y, width, height), in pixels, of images width x height [n].

    `draws` is float [n, 22]: ten tries of (area, log aspect ratio), then the place. The distribution is
    that of torchvision's RandomResizedCrop (Szegedy et al. 2015), its central fallback included.
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
    return np.where(fits.any(axis=1)[:, None], drawn, widest_centre(width, height, ratio))


def widest_centre(width: np.ndarray, height: np.ndarray, ratio: Range) -> np.ndarray:
    """The largest central window within the aspect ratios, int32 [n, 4] as (x, y, width, height)."""
    w = np.minimum(width, np.rint(height * ratio[1]))
    h = np.minimum(height, np.rint(width / ratio[0]))
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=1).astype(np.int32)


def eval_windows(width: np.ndarray, height: np.ndarray, fraction: float, views: int) -> np.ndarray:
    """Square windows of side `fraction` x short side, int32 [n, views, 4] as (x, y, width, height).

    One view is central; more stand evenly along the long side, from edge to edge.
    """
    side = np.maximum(1, np.rint(np.minimum(width, height) * fraction)).astype(np.int64)[:, None]
    place = np.full(1, 0.5) if views == 1 else np.linspace(0, 1, views)
    free_x, free_y = width[:, None] - side, height[:, None] - side
    wide = (width >= height)[:, None]
    x = np.rint(free_x * np.where(wide, place, 0.5))
    y = np.rint(free_y * np.where(wide, 0.5, place))
    side = np.broadcast_to(side, x.shape)
    return np.stack([x, y, side, side], axis=2).astype(np.int32)


def rounded(value: Fraction | int) -> int:
    """The nearest integer; halves round up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def clip_offsets(counts: np.ndarray, frames: int, stride: Fraction | int) -> np.ndarray:
    """Each clip frame's distance from the first, int64 [n, frames], in clips of counts [n] frames.

    Frame k is at k * stride, rounded to a whole frame, halves up. In a clip that is too short for that, the
    stride shrinks to the largest whole number that fits, at least 1.
    """
    steps = np.arange(frames, dtype=np.int64)
    whole = np.array([rounded(k * stride) for k in range(frames)], np.int64)
    shrunk = np.maximum(1, (counts - 1) // max(1, frames - 1))
    return np.where((counts > whole[-1])[:, None], whole, shrunk[:, None] * steps)


def clip_frames_train(
    draws: np.ndarray, counts: np.ndarray, frames: int, stride: Fraction | int
) -> np.ndarray:
    """Frame indices int64 [n, frames] of a window that starts at random; `draws` [n] in [0, 1).

    In a clip that is too short the stride shrinks to what fits, then the last frame repeats.
    """
    offsets = clip_offsets(counts, frames, stride)
    starts = np.floor(draws * (free_starts(counts, offsets) + 1)).astype(np.int64)
    return frame_runs(starts, counts, offsets)


def clip_frames_eval(counts: np.ndarray, frames: int, stride: Fraction | int, views: int = 1) -> np.ndarray:
    """Frame indices int64 [n, views, frames]: the central window, or `views` evenly from end to end."""
    offsets = clip_offsets(counts, frames, stride)
    place = np.full(1, 0.5) if views == 1 else np.linspace(0, 1, views)
    starts = np.floor(free_starts(counts, offsets)[:, None] * place).astype(np.int64)
    return frame_runs(starts, counts[:, None], offsets[:, None])


def clip_frames_from(start: int, counts: np.ndarray, frames: int, stride: Fraction | int) -> np.ndarray:
    """Frame indices int64 [n, frames] of the window at `start`, earlier where no whole one fits there."""
    offsets = clip_offsets(counts, frames, stride)
    return frame_runs(np.minimum(start, free_starts(counts, offsets)), counts, offsets)


def free_starts(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The last start [n] at which a whole window fits, 0 if none does; `offsets` [n, frames]."""
    return np.maximum(0, counts - 1 - offsets[:, -1])


def frame_runs(starts: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """starts + offsets [..., frames], at most the clip's last frame, int64 [..., frames]."""
    return np.minimum(starts[..., None] + offsets, counts[..., None] - 1).astype(np.int64)


def segment_frames(places: np.ndarray | float, counts: np.ndarray, frames: int) -> np.ndarray:
    """Frame indices int64 [n, frames]: one from each of `frames` equal parts of clips of counts [n] frames.

    places: where in its part each frame is, in [0, 1): [n, frames], or 0.5 for the middles.
    """
    chosen = np.floor((np.arange(frames) + places) * counts[:, None] / frames).astype(np.int64)
    return np.minimum(chosen, counts[:, None] - 1)
