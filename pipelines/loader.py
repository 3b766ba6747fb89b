"""Catalogue -> batches of torch tensors. A step's batch follows from seed, data and step alone."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from pipelines import graph, plans, sampler
from pipelines.augment import Augment, augment
from pipelines.catalogue import Catalogue
from pipelines.errors import UserError
from pipelines.faults import Faults
from pipelines.machine import libraries, outside, usable_cores
from pipelines.plans import Bools, Ints, Plan, ViewSpec, clip_notes

__all__ = ["Augment", "Batch", "ViewSpec", "clip_notes", "eval_batches", "sizing", "train_batches"]

READ_AHEAD = 4  # batches before its own that a file is asked for
MOST_THREADS = 12  # for a GPU, unless more are asked for; it decodes the greater part itself


@dataclass(frozen=True)
class Batch:
    """b rows; a sample's evaluation views, or its repeats in training, stand side by side."""

    pixels: torch.Tensor  # uint8 [b, H, W, 3] or [b, T, H, W, 3], on the device
    labels: torch.Tensor  # int64 [b], on the CPU, -1: unlabelled
    ids: Ints  # [b]
    epochs: Ints  # [b] -1 in evaluation; with r repeats the k-th row has epoch * r + k
    positions: Ints  # [b] -1 in evaluation; else consecutive: step * global batch + row of the global batch
    valid: Bools  # [b] False in evaluation: padding of a last batch, or a damaged sample
    bad: int = 0  # rows in which another sample stands in for a damaged one
    decoded: torch.cuda.Event | None = None  # on CUDA: when the pixels were there, not yet augmented


@dataclass(frozen=True)
class Sizing:
    """What the machine allows, and why."""

    threads: int
    prefetch: int  # batches made ahead
    reason: str


def train_batches(
    catalogue: Catalogue,
    view: ViewSpec,
    *,
    seed: int,
    global_batch: int,
    rank: int,
    world: int,
    accumulate: int = 1,
    start_step: int = 0,
    device: torch.device,
    threads: int = 0,
    order: str = "random",
    window: int = 4096,
    max_bad: float = 0.001,
    hw_decoder_load: float = 0.65,
    decode: str = "whole",
) -> Iterator[Batch]:
    """Endless micro batches of this rank, `accumulate` of them per step, from `start_step` on.

    `global_batch` counts the rows of a step over all ranks; the same rows with the same windows make up
    a step at any number of processes. `order` is "random" (one permutation of everything) or "local"
    (shards permuted, then windows of `window` samples shuffled). Damaged samples are named on
    stderr and replaced. Raises UserError when more than the share `max_bad` of the split's samples (at
    least one) is damaged, when the data does not suit the view, or when the batch does not divide. Each
    rank compares the distinct samples that it found damaged with the whole limit: a rank meets other
    samples every epoch, so a share of the limit would be used up although nothing new is damaged. With
    more ranks the stop thus comes later, and never without reason.
    """
    plans.check_view(catalogue, view)
    if global_batch % (world * accumulate * view.repeats):
        raise UserError(
            f"a batch of {global_batch} does not divide into {world} processes x {accumulate} micro batches "
            f"x {view.repeats} repeats; make it a multiple of {world * accumulate * view.repeats}"
        )
    arrange = make_order(catalogue, order, window, seed)

    def positions(iteration: int) -> Ints:
        step, micro = divmod(start_step * accumulate + iteration, accumulate)
        return sampler.batch_positions(step, global_batch, rank, world, accumulate)[micro]

    def plan(iteration: int) -> Plan:
        rows = plans.repeated(positions(iteration), view.repeats, arrange)
        return plans.train_plan(catalogue, view, seed, *rows)

    def replan(ids: Ints, epochs: Ints) -> Plan:
        epochs = (epochs[:, None] + np.arange(view.copies)).ravel()
        return plans.train_plan(catalogue, view, seed, np.repeat(ids, view.copies), epochs)

    count = global_batch // (world * accumulate)
    settings = settings_of(view, count, view.copies, device, threads)
    settings = replace(settings, hw_decoder_load=hw_decoder_load, decode=decode)
    limit = damage_limit(catalogue, max_bad)
    faults = Faults(catalogue, settings, seed, view.copies, unit=view.copies, limit=limit, replan=replan)

    def batch(iteration: int, rows: Plan, pixels: torch.Tensor) -> Batch:
        decoded = mark(device)  # before the augmentation, which is computing and not waiting
        augment(pixels, view.augment, seed, rows.epochs, rows.ids)
        return replace(batch_of(faults, rows, positions(iteration), pixels), decoded=decoded)

    return (batch(i, rows, pixels) for i, (rows, pixels) in enumerate(run_plans(faults, plan, settings)))


def eval_batches(
    catalogue: Catalogue,
    view: ViewSpec,
    *,
    batch: int,
    rank: int,
    world: int,
    device: torch.device,
    threads: int = 0,
    temporal: int = 1,
    spatial: int = 1,
    max_bad: float = 0.001,
    hw_decoder_load: float = 0.65,
    decode: str = "whole",
) -> Iterator[Batch]:
    """Every sample once over all ranks, in `temporal` x `spatial` views; `batch` counts samples.

    Each rank gets the same number of batches; rows that fill up the last ones have valid = False, and so
    have those of damaged samples. Raises UserError as `train_batches` does; since a rank meets only its own
    samples here, the caller compares the damage of all ranks with `damage_limit`.
    """
    plans.check_view(catalogue, view, temporal)
    ids = sampler.eval_ids(len(catalogue), rank, world)
    batches = -(-len(catalogue) // (world * batch))
    padded = np.concatenate([ids, np.zeros(batches * batch - len(ids), np.int64)])
    valid = np.arange(len(padded)) < len(ids)

    def plan(iteration: int) -> Plan:
        if iteration >= batches:
            raise StopIteration
        rows = slice(iteration * batch, (iteration + 1) * batch)
        return plans.eval_plan(catalogue, view, padded[rows], valid[rows], temporal, spatial)

    def replan(ids: Ints, _: Ints) -> Plan:
        return plans.eval_plan(catalogue, view, ids, np.zeros(len(ids), bool), temporal, spatial)

    views = temporal * spatial
    settings = settings_of(view, batch * views, spatial, device, threads)
    settings = replace(settings, hw_decoder_load=hw_decoder_load, decode=decode)
    limit = damage_limit(catalogue, max_bad)
    faults = Faults(catalogue, settings, 0, copies=spatial, unit=views, limit=limit, replan=replan)
    none = np.full(batch * views, -1)
    return (
        batch_of(faults, row_plan, none, pixels) for row_plan, pixels in run_plans(faults, plan, settings)
    )


def damage_limit(catalogue: Catalogue, max_bad: float) -> int:
    """How many samples of a split may be damaged: the share `max_bad`, and always one."""
    return max(1, int(max_bad * len(catalogue)))


def blank_batch(view: ViewSpec, rows: int, device: torch.device) -> Batch:
    """A batch of black pictures or clips, to try a model with."""
    pixels = torch.zeros(rows, view.frames, view.size, view.size, 3, dtype=torch.uint8, device=device)
    zeros = np.zeros(rows, np.int64)
    pixels = pixels if view.frames > 1 else pixels.squeeze(1)
    labels, positions = torch.zeros(rows, dtype=torch.int64), np.arange(rows)
    return Batch(pixels, labels, zeros, zeros, positions, np.ones(rows, bool))


def run_plans(
    faults: Faults, plan: Callable[[int], Plan], settings: graph.Settings
) -> Iterator[tuple[Plan, torch.Tensor]]:
    """Run plan(0), plan(1), ... through one pipeline, and through a new one after a damaged sample.

    Gives each plan, repaired, with its pixels uint8 [rows, (T,) H, W, 3], until plan raises StopIteration.
    """
    catalogue, resampling = faults.catalogue, graph.start_resampling(settings)
    planned = lru_cache(maxsize=READ_AHEAD + settings.prefetch + 2)(plan)
    reader = ThreadPoolExecutor(1, thread_name_prefix="read")
    done = 0

    def read(number: int) -> tuple[Plan, graph.Feed]:
        rows = planned(number)
        advise(catalogue, planned, number)
        return rows, plans.feed_of(catalogue, rows, settings.copies)

    @lru_cache(maxsize=2)
    def coming(number: int) -> Future[tuple[Plan, graph.Feed]]:
        return reader.submit(read, number)

    while True:
        waiting: deque[tuple[Plan, graph.Feed]] = deque()  # fed to the graph, not yet come out of it

        def source(iteration: int, first: int = done, waiting: deque = waiting) -> graph.Feed:
            ready = coming(first + iteration).result()
            coming(first + iteration + 1)
            waiting.append(faults.repair(*ready))
            return waiting[-1][1]

        try:
            pipeline = graph.build_pipeline(source, settings)
            while True:
                pixels = graph.run(pipeline, settings, waiting, resampling)
                yield waiting.popleft()[0], pixels if settings.clip > 1 else pixels.squeeze(1)
                done += 1
        except StopIteration:
            return
        except RuntimeError as error:
            faults.examine([rows for rows, _ in waiting], error)


def advise(catalogue: Catalogue, planned: Callable[[int], Plan], number: int) -> None:
    """Ask for the files of the batch READ_AHEAD from here; at the first also of those before it."""
    for ahead in range(READ_AHEAD if number else 1, READ_AHEAD + 1):
        try:
            rows = planned(number + ahead)
        except StopIteration:
            return
        catalogue.will_need(rows.ids, rows.frames)


def batch_of(faults: Faults, plan: Plan, positions: Ints, pixels: torch.Tensor) -> Batch:
    """Put together what came out of the graph and what never went in."""
    labels = torch.from_numpy(faults.catalogue.label[plan.ids].astype(np.int64))
    return Batch(pixels, labels, plan.ids, plan.epochs, positions, plan.valid, int(plan.replaced.sum()))


def mark(device: torch.device | None) -> torch.cuda.Event | None:
    """An event of now on the device's stream, None without CUDA; two of them give the time between."""
    if device is None or device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def make_order(catalogue: Catalogue, name: str, window: int, seed: int) -> sampler.Order:
    """The order of training samples that `name` stands for. Raises UserError for an unknown one."""
    if name == "local":
        return sampler.local_order(catalogue.shard, seed, window)
    if name != "random":
        raise UserError(f"unknown order {name!r}; choose random or local")
    return lambda positions: sampler.sample_at(positions, len(catalogue), seed)


def settings_of(view: ViewSpec, rows: int, copies: int, device: torch.device, threads: int) -> graph.Settings:
    """The graph that makes `rows` rows at a time, `copies` of them from each decoded sample."""
    size, shape = sizing(device, threads), (rows // copies, view.frames, copies, view.size)
    return graph.Settings(*shape, view.interpolation, device, size.threads, size.prefetch)


def sizing(device: torch.device, threads: int = 0) -> Sizing:
    """Decoding threads and queue depth for this process, and the reason in words; 0 = from the machine."""
    cores, processes = usable_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = max(1, cores // processes)
    if device.type == "cuda" and share > 2:
        share -= 1  # for the thread that feeds the GPU
    why = f"{cores} cores, {processes} processes"
    if device.type == "cuda" and share > MOST_THREADS:
        share, why = MOST_THREADS, f"{why}, at most {MOST_THREADS} for a GPU: each one takes GPU memory"
    chosen, ahead = threads or share, 2 if device.type == "cuda" else 4
    why = "as asked" if threads else why
    reason = f"{chosen} decoding threads ({why}), {ahead} batches made and {READ_AHEAD} more read ahead"
    return Sizing(chosen, ahead, reason)


def words(device: torch.device, threads: int = 0) -> list[str]:
    """What this process's loader works with, in lines to print; for a GPU also the library that decodes.

    An older nvJPEG in LD_LIBRARY_PATH comes before the environment's, and then the CPU may decode instead.
    """
    line = f"loader: {sizing(device, threads).reason}"
    if device.type != "cuda":
        return [line]
    smallest = graph.Settings(1, 1, 1, 8, "linear", torch.device("cpu"), threads=1)
    graph.build_pipeline(lambda _: next(iter(())), smallest)  # one with any decoder loads the library
    found = libraries("libnvjpeg.so")
    if not found:
        return [line, "nvJPEG is not loaded: the CPU decodes every picture; install the environment again"]
    fix = "is not the environment's nvJPEG; take its folder out of LD_LIBRARY_PATH"
    return [f"{line}, decoded by {', '.join(map(str, found))}", *(f"{p} {fix}" for p in outside(found))]
