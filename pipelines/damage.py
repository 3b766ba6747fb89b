"""Damaged frames are replaced; a frame that does not decode although its checksum is correct is named.

A frame that was damaged after packing is found by its checksum when it is read, and another sample replaces
its sample. Which one depends on the seed, the epoch and the damaged sample alone: not on rank or order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pipelines import order
from pipelines.dataset import Dataset
from pipelines.decode import Decoder, Jpegs
from pipelines.errors import UserError, cause, of_machine
from pipelines.files import warn_once
from pipelines.views import Ints, Layout, Rows, replace_rows

CPU = torch.device("cpu")


@dataclass
class Replacements:
    """Damaged samples seen by this process, and their replacements.

    The limit holds for each process alone: a rank meets other samples every epoch, so with a share of the
    limit it would stop although nothing new is damaged. With more ranks the run stops later.
    """

    dataset: Dataset
    layout: Layout
    seed: int
    limit: int  # samples that may be damaged
    redraw: Callable[[Ints, Rows], Rows]  # see Loader
    seen: dict[int, str] = field(default_factory=dict)  # sample id -> where the damage is

    def read(self, rows: Rows) -> tuple[Rows, Jpegs]:
        """Read the JPEGs of a batch; units of rows with a damaged frame are replaced first.

        Raises UserError when more samples are damaged than the limit, or nearly all.
        """
        copies, unit = self.layout.copies, self.layout.unit
        for attempt in range(64):
            jpegs = self.dataset.read(rows.ids[::copies], rows.frames[::copies])
            damaged = [place for place, jpeg in enumerate(jpegs) if not len(jpeg)]
            if not damaged:
                return rows, jpegs
            self.note(rows, damaged)
            units = np.unique(np.array(damaged) // rows.frames.shape[1] * copies // unit)
            rows = self.replace(rows, units, attempt)
        raise self.too_many("so many that no undamaged ones were found to replace them")

    def replace(self, rows: Rows, units: Ints, attempt: int) -> Rows:
        """The rows with other samples, drawn from (seed, epoch, id, attempt), in these units."""
        first = units * self.layout.unit
        places = (first[:, None] + np.arange(self.layout.unit)).ravel()
        keys = (rows.epochs[first], rows.ids[first], order.STREAM_REPLACE)
        draws = order.uniform(self.seed, *keys, attempt + 1)[:, attempt]
        others = (draws * len(self.dataset)).astype(np.int64)
        old = Rows._make(column[places] for column in rows)
        return replace_rows(rows, places, self.redraw(others, old))

    def note(self, rows: Rows, damaged: list[int]) -> None:
        """Warn of each damaged sample once; raise UserError when there are too many."""
        for place in damaged:
            sample, where = frame_at(self.dataset, rows, self.layout.copies, place)
            if sample not in self.seen:
                self.seen[sample] = f"{where} is not what was packed: its checksum differs"
                warn_once(f"{self.seen[sample]}; another sample replaces it")
        if len(self.seen) > self.limit:
            raise self.too_many(f"more than the {self.limit} allowed")

    def too_many(self, how_many: str) -> UserError:
        """The error that names the damaged samples; at most 20."""
        listed = "; ".join(list(self.seen.values())[:20])
        return UserError(f"{len(self.seen)} samples are damaged, {how_many}; {self.advice()}: {listed}")

    def advice(self) -> str:
        """What to do about the damage. A shard whose samples are all wrong is another dataset's file."""
        shards, strange = self.dataset.shard, []
        for shard in np.unique(shards[list(self.seen)]).tolist():
            some = np.flatnonzero(shards == shard)[:8]
            if not any(len(jpeg) for jpeg in self.dataset.read(some, np.zeros((len(some), 1), np.int64))):
                strange.append(str(self.dataset.tar_path(shard)))
        if strange:
            return f"{', '.join(strange)} must have been replaced or swapped since packing: restore them"
        return f"run `make verify DATA={self.dataset.info.root}` and pack them again"


def damage_limit(dataset: Dataset, max_bad: float) -> int:
    """How many samples of a split may be damaged: the share `max_bad`, at least one."""
    return max(1, int(max_bad * len(dataset)))


def frame_at(dataset: Dataset, rows: Rows, copies: int, place: int) -> tuple[int, str]:
    """The sample of the frame that is JPEG `place` of a batch, and the frame's tar, member and byte."""
    row, column = divmod(place, rows.frames.shape[1])
    sample, frame = int(rows.ids[row * copies]), int(rows.frames[row * copies, column])
    offset = int(dataset.offset[dataset.first_frame[sample] + frame])
    tar = dataset.tar_path(int(dataset.shard[sample]))
    return sample, f"{tar}: {dataset.member_name(sample, frame)} at byte {offset}"


def raise_undecodable(dataset: Dataset, decoder: Decoder, error: RuntimeError) -> None:
    """Raise a UserError that names the frame on which the decoder failed, if one fails when decoded alone."""
    small = replace(decoder.data, frames=1, size=8)
    alone = replace(decoder, data=small, samples=1, ahead=1)
    gpu = decoder.device.type == "cuda"
    fix = (
        f"{cause(error)}; set speed.decode to whole and speed.hw_decoder_load to 0, or use the CPU "
        "(DEVICE=cpu, --speed.device cpu)"
    )
    for rows, encoded in decoder.waiting:
        for place, jpeg in enumerate(encoded.jpegs):
            if decodes(alone, rows, place, jpeg):
                continue
            _, where = frame_at(dataset, rows, decoder.copies, place)
            if gpu and decodes(replace(alone, device=CPU, resize_on_cpu=True), rows, place, jpeg):
                raise UserError(
                    f"the GPU's decoder failed on {where}, which the CPU decodes: {fix}"
                ) from error
            raise UserError(
                f"{where} does not decode, although its checksum is correct ({cause(error).rstrip(' :')}); "
                f"inspect it with `make verify DATA={dataset.info.root}`"
            ) from error
    if gpu and decoder.waiting:
        _, where = frame_at(dataset, decoder.waiting[0][0], decoder.copies, 0)
        raise UserError(f"the GPU's decoder failed on a batch that begins with {where}: {fix}") from error


def decodes(alone: Decoder, rows: Rows, place: int, jpeg: np.ndarray) -> bool:
    """Whether JPEG `place` of a batch decodes alone. Raises errors that no JPEG can cause."""
    first = place // rows.frames.shape[1] * alone.copies
    part = Rows._make(column[first : first + alone.copies] for column in rows)
    try:
        alone.feed(part._replace(frames=part.frames[:, :1]), [jpeg])
        alone.take()
    except RuntimeError as error:
        if of_machine(error):
            raise
        return False
    return True
