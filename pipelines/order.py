"""The order of samples, and random draws: functions of (seed, epoch, sample id) and of a stream position.

No generator object is kept. The batch of any step, on any number of processes, follows from the step's
number alone, so resuming in the middle of an epoch is exact and takes no time.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
EVALUATION = -1  # the "epoch" under which evaluation draws

Order = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # positions [n] -> epochs [n], ids [n]

# What a draw is for; two streams of one sample are independent.
STREAM_WINDOW, STREAM_FLIP, STREAM_START, STREAM_MASK, STREAM_ORDER = range(5)
STREAM_JITTER, STREAM_ERASE, STREAM_SHARDS, STREAM_NEARBY, STREAM_REPLACE = range(5, 10)
STREAM_MODEL, STREAM_MIX = range(10, 12)
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


def row_keys(seed: int, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Keys int64 [n] from which the model draws what it drops of each sample [n] in its epoch [n]."""
    return keys_of(seed, STREAM_MODEL, epochs, ids).view(np.int64)


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


def make_order(kind: str, shards: np.ndarray, seed: int, window: int) -> Order:
    """The order of training samples that DataConfig.order names; `shards` [N] is ascending."""
    if kind == "local":
        return LocalOrder(shards, seed, window)
    return partial(sample_at, size=len(shards), seed=seed)


class LocalOrder:
    """An order that reads nearly in sequence, for disks and network file systems: positions -> (epochs, ids).

    Shards come in random order, and the samples in them are shuffled within windows of `window` samples. As
    exact as `sample_at`, and it keeps no state but the shards' order of one epoch.
    """

    def __init__(self, shards: np.ndarray, seed: int, window: int) -> None:
        self.seed, self.window, self.size = seed, window, len(shards)
        self.starts = np.concatenate([[0], np.flatnonzero(np.diff(shards)) + 1, [len(shards)]])
        self.shard_order = lru_cache(maxsize=2)(self._shard_order)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.size)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self._ids(int(epoch), places[epochs == epoch])
        return epochs, ids

    def _ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The sample ids [n] at places [n] of an epoch."""
        order, ends = self.shard_order(epoch)
        windows, within = np.divmod(places, self.window)
        sizes = np.minimum(self.window, self.size - windows * self.window)
        keys = keys_of(self.seed, STREAM_NEARBY, epoch, windows)
        for length in np.unique(sizes):
            rows = sizes == length
            within[rows] = permute(within[rows], int(length), keys[rows])
        places = windows * self.window + within
        slot = np.searchsorted(ends, places, side="right") - 1
        return self.starts[order[slot]] + places - ends[slot]

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in an epoch's order, and how many samples come before each of them."""
        lengths, count = np.diff(self.starts), len(self.starts) - 1
        order = permute(np.arange(count), count, keys_of(self.seed, STREAM_SHARDS, np.full(count, epoch)))
        return order, np.concatenate([[0], np.cumsum(lengths[order])])


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
