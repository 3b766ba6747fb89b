"""Frames damaged after packing, in training and evaluation: found, named, replaced, counted.

Most fail their checksum when read and never get further. One that is as packed and yet does not decode kills
a DALI pipeline for good: the loader then decodes the batches under way frame by frame, replaces what fails by
other samples and goes on with a new pipeline. Whether a row is replaced, and by which sample, depends on its
own bytes, window and epoch alone: not on rank, order or earlier failures. The CPU decides what is damaged: a
picture that only the GPU's decoder fails on is the decoder's error, and stops the run.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch

from pipelines import graph, sampler
from pipelines.catalogue import Catalogue
from pipelines.errors import UserError, cause, of_machine
from pipelines.plans import Ints, Plan, feed_of

# New rows for sample ids [n] in epochs [n]: a plan of n * unit rows.
Replan = Callable[[Ints, Ints], Plan]


@dataclass
class Faults:
    """What one process knows of samples that fail; it grows while a run goes on."""

    catalogue: Catalogue
    settings: graph.Settings  # of the graph that the samples go through
    seed: int
    copies: int  # rows that share their decoded frames
    unit: int  # rows that are replaced together: a sample's views, or its copies
    limit: int  # samples that may fail before the run stops
    replan: Replan
    suspects: dict[int, str] = field(default_factory=dict)  # sample id -> what was said of it

    def repair(self, plan: Plan, feed: graph.Feed) -> tuple[Plan, graph.Feed]:
        """The plan and what it feeds with every damaged unit replaced; costs little while none has failed."""
        for attempt in range(8):
            self.note(plan, empty(feed), "is not what was packed: its checksum differs")
            groups = plan.ids[:: self.unit]
            checked = [unit for unit, sample in enumerate(groups.tolist()) if sample in self.suspects]
            bad = [unit for unit in checked if failing(self, self.rows_of(plan, unit))]
            if not bad:
                return plan, feed
            plan = self.replace(plan, np.array(bad), attempt)
            feed = feed_of(self.catalogue, plan, self.copies)
        raise UserError(f"{self.catalogue.info.root} has too many damaged samples; run `make verify`")

    def rows_of(self, plan: Plan, unit: int) -> Plan:
        return Plan._make(part[unit * self.unit : (unit + 1) * self.unit] for part in plan)

    def replace(self, plan: Plan, units: Ints, attempt: int) -> Plan:
        """The plan with other samples, drawn from (seed, epoch, id, attempt), in these units."""
        first = units * self.unit
        ids, epochs = plan.ids[first], plan.epochs[first]
        draws = sampler.uniform(self.seed, epochs, ids, sampler.STREAM_REPLACE, attempt + 1)[:, attempt]
        others = self.replan((draws * len(self.catalogue)).astype(np.int64), epochs)
        rows = (first[:, None] + np.arange(self.unit)).ravel()
        whole = Plan._make(part.copy() for part in plan)
        for part, other in zip(whole, others, strict=True):
            part[rows] = other
        whole.replaced[rows] = True
        return whole

    def examine(self, plans: list[Plan], error: RuntimeError) -> None:
        """After a pipeline died with `error`: find the samples at fault and name each once.

        Raises UserError with the list when there are too many, or when a GPU's decoder fails on what the CPU
        decodes, and `error` when memory, the driver or the GPU failed or nothing explains it.
        """
        if of_machine(error):
            raise error
        known = len(self.suspects)
        for plan in plans:
            self.note(plan, failing(self, plan), "does not decode")
        if len(self.suspects) > known:
            return
        if self.settings.device.type != "cuda":
            raise error
        raise UserError(
            f"the GPU's decoder failed on {self.culprit(plans)}, which the CPU decodes: "
            f"{cause(error)}; set speed.decode to whole and speed.hw_decoder_load to 0, or use the CPU "
            "(DEVICE=cpu, --speed.device cpu)"
        ) from error

    def culprit(self, plans: list[Plan]) -> str:
        """The first frame on which the device's decoder fails, in words; else the batch's first frame."""
        for plan in plans:
            feed = feed_of(self.catalogue, plan, self.copies)
            try:
                place = first_failing(feed, 0, self.settings)
            except RuntimeError:  # the device is beyond use
                break
            if place < len(feed.jpegs):
                return self.words_of(plan, place)[1]
        return f"a batch with {self.words_of(plans[0], 0)[1]}" if plans else "an unknown batch"

    def words_of(self, plan: Plan, place: int) -> tuple[int, str]:
        """The sample of frame `place` of `feed_of(plan)`, and where that frame is: tar, member, byte."""
        catalogue, per_group = self.catalogue, plan.frames.shape[1]
        row = place // per_group * self.copies
        sample, frame = int(plan.ids[row]), int(plan.frames[row, place % per_group])
        tar = catalogue.tar_path(int(catalogue.shard[sample]))
        offset = int(catalogue.offset[catalogue.first_frame[sample] + frame])
        return sample, f"{tar}: {catalogue.member_name(sample, frame)} at byte {offset}"

    def note(self, plan: Plan, frames: Sequence[int], reason: str) -> None:
        """Name samples by failing frames of `feed_of(plan)`, each once; UserError when there are too many."""
        for place in frames:
            sample, where = self.words_of(plan, place)
            if sample not in self.suspects:
                said = f"{where} {reason}"
                self.suspects[sample] = said
                say_once(f"{said}; another sample takes its place")
        if frames and len(self.suspects) > self.limit:
            listed = "; ".join(list(self.suspects.values())[:20])
            raise UserError(
                f"{len(self.suspects)} samples are damaged, more than the {self.limit} allowed; "
                f"{self.advice()}: {listed}"
            )

    def advice(self) -> str:
        """What to do about the samples noted so far; a shard of which nothing is right is another's file."""
        shards, root = self.catalogue.shard, self.catalogue.info.root
        strange = []
        for shard in np.unique(shards[list(self.suspects)]).tolist():
            some = np.flatnonzero(shards == shard)[:8]
            if not any(len(jpeg) for jpeg in self.catalogue.read(some, np.zeros((len(some), 1), np.int64))):
                strange.append(str(self.catalogue.tar_path(shard)))
        if strange:
            return f"{', '.join(strange)} must have been replaced or swapped since packing: restore them"
        return f"run `make verify DATA={root}` and pack them again"


@cache
def say_once(sentence: str) -> None:
    """Print to stderr what this process has not said before."""
    print(sentence, file=sys.stderr, flush=True)


def empty(feed: graph.Feed) -> list[int]:
    """Indices of the frames that failed their checksum."""
    return [index for index, jpeg in enumerate(feed.jpegs) if not len(jpeg)]


def failing(faults: Faults, plan: Plan) -> list[int]:
    """Indices of the damaged frames of `feed_of(plan)`: by their checksums, or else each tried on the CPU."""
    feed = feed_of(faults.catalogue, plan, faults.copies)
    bad = empty(feed)
    # Decoded like the graph's, whole or windows, but on the CPU.
    on_cpu = replace(faults.settings, device=torch.device("cpu"), resize_on_cpu=faults.settings.resizes)
    start = len(feed.jpegs) if bad else 0
    while start < len(feed.jpegs):
        start = first_failing(feed, start, on_cpu)
        if start < len(feed.jpegs):
            bad.append(start)
        start += 1
    return bad


def first_failing(feed: graph.Feed, start: int, settings: graph.Settings) -> int:
    """Index of the first frame from `start` on that does not decode alone, or the number of frames.

    Raises RuntimeError for what no picture can cause.
    """

    def source(iteration: int) -> graph.Feed:
        index = start + iteration
        if index >= len(feed.jpegs):
            raise StopIteration
        box = feed.boxes[index : index + 1]
        whole = np.concatenate([np.zeros_like(box[:, :2]), box[:, 2:]], axis=1)[:, None]
        return graph.Feed(feed.jpegs[index : index + 1], box, whole, np.zeros((1, 1), bool))

    alone = replace(settings, samples=1, clip=1, copies=1, size=8, threads=1, prefetch=1)
    pipeline = graph.build_pipeline(source, alone)
    for index in range(start, len(feed.jpegs)):
        try:
            pipeline.run()
        except RuntimeError as error:
            if of_machine(error):
                raise
            return index
    return len(feed.jpegs)
