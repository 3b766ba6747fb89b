"""Dataset -> batches of torch tensors. A step's batch follows from seed, data and step alone.

A frame that was damaged after packing is found by its checksum when it is read, and another sample replaces
its sample. Which one depends on the seed, the epoch and the damaged sample alone: not on rank or order.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines import order, views
from pipelines.augment import augment
from pipelines.config import DataConfig, DecodeConfig
from pipelines.dataset import Dataset
from pipelines.decode import Decoder, Jpegs, frame_at, raise_undecodable
from pipelines.errors import UserError, in_loader, of_machine
from pipelines.files import warn_once
from pipelines.machine import READ, World, sizing
from pipelines.views import Bools, Ints, Layout, Rows, replace_rows

READ_AHEAD = 4  # batches from asking the kernel for a batch's files to reading them

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The rows of a batch and their pixels."""

    pixels: Tensor  # uint8 [b, H, W, 3] or [b, T, H, W, 3], on the device
    labels: Tensor  # int64 [b], on the CPU, -1: unlabelled
    rows: Rows
    decoded: torch.cuda.Event | None = None  # on CUDA: when the pixels were decoded, not yet augmented

    @property
    def ids(self) -> Ints:
        return self.rows.ids

    @property
    def epochs(self) -> Ints:
        return self.rows.epochs

    @property
    def positions(self) -> Ints:
        return self.rows.positions

    @property
    def valid(self) -> Bools:
        return self.rows.valid

    @property
    def bad(self) -> int:
        """Rows in which another sample replaces a damaged one."""
        return int(self.rows.replaced.sum())


@dataclass(frozen=True)
class Loader(ABC):
    """Batches of a dataset for one process: endless in training, one pass in evaluation.

    Raises UserError when the dataset cannot give these views, when more than `damage_limit` of its samples
    are damaged, and for a frame that does not decode.
    """

    dataset: Dataset
    config: DataConfig
    decode: DecodeConfig
    world: World
    seed: int = field(default=0, kw_only=True)
    """Of all draws; an evaluation draws only the samples that replace damaged ones."""

    def __iter__(self) -> Iterator[Batch]:
        decoder = self.decoder()
        try:
            for rows, frames in decoder.stream(prefetch(self.read(), depth=READ)):
                decoded = mark(self.world.device)  # before the augmentation, which computes and does not wait
                self.augment(frames, rows)
                labels = torch.from_numpy(self.dataset.label[rows.ids].astype(np.int64))
                yield Batch(frames, labels, rows, decoded)
        except RuntimeError as error:
            if in_loader(error) and not of_machine(error):
                raise_undecodable(self.dataset, decoder, error)
            raise

    def read(self) -> Iterator[tuple[Rows, Jpegs]]:
        """The rows and JPEGs of every batch, checked, with damaged samples replaced."""
        replacements = Replacements(self)
        coming: deque[Rows] = deque()
        for rows in self.rows():
            self.dataset.will_need(rows.ids, rows.frames)
            coming.append(rows)
            if len(coming) > READ_AHEAD:
                yield replacements.read(coming.popleft())
        yield from map(replacements.read, coming)

    def decoder(self) -> Decoder:
        """The decoder of these batches, with the threads that this process may use."""
        size, layout = sizing(self.world.device, self.decode.threads), self.layout()
        decode = replace(self.decode, threads=size.threads)
        samples, ahead = layout.rows // layout.copies, min(size.prefetch, layout.batches)
        return Decoder(self.config, decode, self.world.device, samples, layout.copies, ahead)

    @abstractmethod
    def layout(self) -> Layout: ...

    @abstractmethod
    def rows(self) -> Iterator[Rows]:
        """The rows of every batch of this process."""

    @abstractmethod
    def redraw(self, ids: Ints, rows: Rows) -> Rows:
        """Rows of samples ids [n] in place of `rows` [n * unit]."""

    @abstractmethod
    def augment(self, frames: Tensor, rows: Rows) -> None:
        """Augment a batch in place."""


@dataclass(frozen=True)
class TrainLoader(Loader):
    """Random views in micro batches.

    A step has the same rows at any number of processes and micro batches.
    """

    batch: int = field(kw_only=True)
    """Rows of a step over all processes."""
    accumulate: int = field(default=1, kw_only=True)
    """Micro batches of a step."""
    start_step: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        views.check_dataset(self.dataset, self.config)
        parts = self.world.size * self.accumulate
        if self.batch % (parts * self.config.repeats):
            raise UserError(
                f"a batch of {self.batch} is not divisible by {self.world.size} processes x "
                f"{self.accumulate} micro batches x {self.config.repeats} repeats; use a multiple of "
                f"{parts * self.config.repeats}"
            )

    def layout(self) -> Layout:
        rows = self.batch // (self.world.size * self.accumulate)
        return Layout(rows, self.config.copies, self.config.copies)

    def rows(self) -> Iterator[Rows]:
        rank, size, repeats = self.world.rank, self.world.size, self.config.repeats
        arrange = order.make_order(self.config.order, self.dataset.shard, self.seed, self.config.window)
        for step in count(self.start_step):
            for positions in order.batch_positions(step, self.batch, rank, size, self.accumulate):
                epochs, ids = arrange(positions // repeats)
                epochs = epochs * repeats + positions % repeats
                rows = views.train_rows(self.dataset, self.config, self.seed, ids, epochs)
                yield rows._replace(positions=positions)

    def redraw(self, ids: Ints, rows: Rows) -> Rows:
        ids = np.repeat(ids, self.config.copies)
        return views.train_rows(self.dataset, self.config, self.seed, ids, rows.epochs)

    def augment(self, frames: Tensor, rows: Rows) -> None:
        augment(frames, rows, self.config.augment, self.seed)


@dataclass(frozen=True)
class EvalLoader(Loader):
    """Every sample once over all processes, in fixed views.

    Each process makes the same number of batches. Rows that fill up the last ones have valid = False, and so
    have those of damaged samples. A process meets only its own samples here: the caller compares the damage
    of all processes with `damage_limit`.
    """

    samples: int = field(kw_only=True)
    """Samples of a batch; it has a row for each of their views."""
    views: tuple[int, int] = field(default=(1, 1), kw_only=True)
    """Temporal x spatial views of a sample."""

    def __post_init__(self) -> None:
        views.check_dataset(self.dataset, self.config, self.views[0])

    def layout(self) -> Layout:
        temporal, spatial = self.views
        batches = -(-len(self.dataset) // (self.world.size * self.samples))
        return Layout(self.samples * temporal * spatial, spatial, temporal * spatial, batches)

    def rows(self) -> Iterator[Rows]:
        ids = order.eval_ids(len(self.dataset), self.world.rank, self.world.size)
        total = self.layout().batches * self.samples
        padded = np.concatenate([ids, np.zeros(total - len(ids), np.int64)])
        valid = np.arange(total) < len(ids)
        for first in range(0, total, self.samples):
            part = slice(first, first + self.samples)
            yield views.eval_rows(self.dataset, self.config, self.views, padded[part], valid[part])

    def redraw(self, ids: Ints, rows: Rows) -> Rows:
        return views.eval_rows(self.dataset, self.config, self.views, ids, np.zeros(len(ids), bool))

    def augment(self, frames: Tensor, rows: Rows) -> None:
        """Evaluation does not augment."""


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate in a thread of its own, up to `depth` items ahead."""
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="read")
    coming = deque(thread.submit(next, iterator, end) for _ in range(depth))
    try:
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, iterator, end))
            yield item  # pyrefly: ignore
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def blank_batch(config: DataConfig, rows: int, device: torch.device) -> Batch:
    """A batch of black pictures or clips, to try a model with."""
    shape = (rows, config.frames, config.size, config.size, 3)
    pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
    pixels = pixels if config.frames > 1 else pixels.squeeze(1)
    return Batch(pixels, torch.zeros(rows, dtype=torch.int64), views.blank_rows(rows, config.frames))


def mark(device: torch.device | None) -> torch.cuda.Event | None:
    """An event of now on the device's stream, None without CUDA; two of them give the time between."""
    if device is None or device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


# ---- damage


@dataclass
class Replacements:
    """Damaged samples seen by this process, and their replacements.

    The limit holds for each process alone: a rank meets other samples every epoch, so with a share of the
    limit it would stop although nothing new is damaged. With more ranks the run stops later.
    """

    loader: Loader
    seen: dict[int, str] = field(default_factory=dict)  # sample id -> where the damage is

    def read(self, rows: Rows) -> tuple[Rows, Jpegs]:
        """Read the JPEGs of a batch; units of rows with a damaged frame are replaced first.

        Raises UserError when more samples are damaged than the limit, or nearly all.
        """
        layout = self.loader.layout()
        for attempt in range(64):
            jpegs = self.loader.dataset.read(rows.ids[:: layout.copies], rows.frames[:: layout.copies])
            damaged = [place for place, jpeg in enumerate(jpegs) if not len(jpeg)]
            if not damaged:
                return rows, jpegs
            self.note(rows, damaged)
            units = np.unique(np.array(damaged) // rows.frames.shape[1] * layout.copies // layout.unit)
            rows = self.replace(rows, units, attempt)
        raise self.too_many("so many that no undamaged ones were found to replace them")

    def replace(self, rows: Rows, units: Ints, attempt: int) -> Rows:
        """The rows with other samples, drawn from (seed, epoch, id, attempt), in these units."""
        unit = self.loader.layout().unit
        first = units * unit
        places = (first[:, None] + np.arange(unit)).ravel()
        keys = (rows.epochs[first], rows.ids[first], order.STREAM_REPLACE)
        draws = order.uniform(self.loader.seed, *keys, attempt + 1)[:, attempt]
        others = (draws * len(self.loader.dataset)).astype(np.int64)
        old = Rows._make(column[places] for column in rows)
        return replace_rows(rows, places, self.loader.redraw(others, old))

    def note(self, rows: Rows, damaged: list[int]) -> None:
        """Warn of each damaged sample once; raise UserError when there are too many."""
        dataset = self.loader.dataset
        for place in damaged:
            sample, where = frame_at(dataset, rows, self.loader.layout().copies, place)
            if sample not in self.seen:
                self.seen[sample] = f"{where} is not what was packed: its checksum differs"
                trains = rows.epochs[0] != order.EVALUATION
                what = "another sample replaces it" if trains else "the evaluation leaves it out"
                warn_once(f"{self.seen[sample]}; {what}")
        if len(self.seen) > (limit := damage_limit(dataset, self.loader.config.max_bad)):
            raise self.too_many(f"more than the {limit} allowed")

    def too_many(self, how_many: str) -> UserError:
        """The error that names at most 20 damaged samples, and what to do about the damage.

        A shard whose samples are all wrong is another dataset's file.
        """
        dataset, strange = self.loader.dataset, []
        for shard in np.unique(dataset.shard[list(self.seen)]).tolist():
            some = np.flatnonzero(dataset.shard == shard)[:8]
            if not any(len(jpeg) for jpeg in dataset.read(some, np.zeros((len(some), 1), np.int64))):
                strange.append(str(dataset.tar_path(shard)))
        if strange:
            fix = f"{', '.join(strange)} must have been replaced or swapped since packing: restore them"
        else:
            fix = f"run `make verify DATA={dataset.info.root}` and pack them again"
        listed = "; ".join(list(self.seen.values())[:20])
        return UserError(f"{len(self.seen)} samples are damaged, {how_many}; {fix}: {listed}")


def damage_limit(dataset: Dataset, max_bad: float) -> int:
    """How many samples of a split may be damaged: the share `max_bad`, at least one."""
    return max(1, int(max_bad * len(dataset)))
