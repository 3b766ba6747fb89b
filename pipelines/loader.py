"""Catalogue -> batches of torch tensors. A step's batch follows from seed, data and step alone."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import graph, sampler
from pipelines.catalogue import Catalogue
from pipelines.errors import UserError


@dataclass(frozen=True)
class ViewSpec:
    """How a sample is cut in time and space."""

    size: int  # side of the square output in pixels
    frames: int = 1  # per clip; 1: images
    stride: int = 4  # source frames from one clip frame to the next
    scale: tuple[float, float] = (0.08, 1.0)  # area share of the random resized crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its aspect ratios
    flip: float = 0.5  # probability of a left-right mirror
    interpolation: str = "triangular"  # a key of graph.INTERPOLATIONS
    crop_fraction: float = 224 / 256  # evaluation: side of the square window / short side of the source


@dataclass(frozen=True)
class Batch:
    """b samples; in evaluation with v views each, sample i fills rows i * v to i * v + v - 1."""

    pixels: torch.Tensor  # uint8 [b, H, W, 3] or [b, T, H, W, 3], on the device
    labels: torch.Tensor  # int64 [b], on the CPU, -1: unlabelled
    ids: NDArray[np.int64]  # [b]
    epochs: NDArray[np.int64]  # [b]; -1 in evaluation
    valid: NDArray[np.bool_]  # [b]; False: padding of a last evaluation batch


@dataclass(frozen=True)
class Plan:
    """What one batch of b samples consists of, before a byte is read."""

    ids: NDArray[np.int64]  # [b]
    epochs: NDArray[np.int64]  # [b]
    valid: NDArray[np.bool_]  # [b]
    frames: NDArray[np.int64]  # [b, T] indices into the sample's frames
    windows: NDArray[np.int32]  # [b, 4] x, y, width, height
    flips: NDArray[np.bool_]  # [b]


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
) -> Iterator[Batch]:
    """Endless micro batches of this rank, `accumulate` of them per step, from `start_step` on.

    `global_batch` counts the samples of a step over all ranks; the same samples with the same windows
    make up a step at any number of processes. `threads` 0: chosen from the machine. Raises UserError
    when the data does not suit the view or the batch does not divide.
    """
    check_view(catalogue, view)
    if global_batch % (world * accumulate):
        raise UserError(
            f"a batch of {global_batch} does not divide into {world} processes x {accumulate} micro batches; "
            f"make it a multiple of {world * accumulate}"
        )

    def plan(iteration: int) -> Plan:
        step, micro = divmod(start_step * accumulate + iteration, accumulate)
        positions = sampler.batch_positions(step, global_batch, rank, world, accumulate)[micro]
        return train_plan(catalogue, view, seed, positions)

    return run_plans(catalogue, view, plan, global_batch // (world * accumulate), device, threads)


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
) -> Iterator[Batch]:
    """Every sample once over all ranks, in `temporal` x `spatial` views; `batch` counts samples.

    Each rank gets the same number of batches; rows that fill up the last ones have valid = False.
    Raises UserError when the data does not suit the view.
    """
    check_view(catalogue, view)
    ids = sampler.eval_ids(len(catalogue), rank, world)
    batches = -(-len(catalogue) // (world * batch))
    padded = np.concatenate([ids, np.zeros(batches * batch - len(ids), np.int64)])
    valid = np.arange(len(padded)) < len(ids)

    def plan(iteration: int) -> Plan:
        if iteration >= batches:
            raise StopIteration
        rows = slice(iteration * batch, (iteration + 1) * batch)
        return eval_plan(catalogue, view, padded[rows], valid[rows], temporal, spatial)

    return run_plans(catalogue, view, plan, batch * temporal * spatial, device, threads)


def train_plan(catalogue: Catalogue, view: ViewSpec, seed: int, positions: NDArray[np.int64]) -> Plan:
    """The random windows and flips of the samples at stream positions [b]."""
    epochs, ids = sampler.sample_at(positions, len(catalogue), seed)

    def draw(stream: int, count: int) -> NDArray[np.float64]:
        return sampler.uniform(seed, epochs, ids, stream, count)

    starts = draw(sampler.STREAM_START, 1)[:, 0]
    crops = draw(sampler.STREAM_WINDOW, 22)
    frames = sampler.clip_frames_train(starts, catalogue.frame_counts(ids), view.frames, view.stride)
    width, height = catalogue.width[ids], catalogue.height[ids]
    windows = sampler.random_resized_crop(crops, width, height, view.scale, view.ratio)
    flips = draw(sampler.STREAM_FLIP, 1)[:, 0] < view.flip
    return Plan(ids, epochs, np.ones(len(ids), bool), frames, windows, flips)


def eval_plan(
    catalogue: Catalogue,
    view: ViewSpec,
    ids: NDArray[np.int64],
    valid: NDArray[np.bool_],
    temporal: int,
    spatial: int,
) -> Plan:
    """The fixed views of samples [n]: n * temporal * spatial rows, a sample's views side by side."""
    counts, views = catalogue.frame_counts(ids), temporal * spatial
    frames = sampler.clip_frames_eval(counts, view.frames, view.stride, temporal)
    windows = sampler.eval_windows(catalogue.width[ids], catalogue.height[ids], view.crop_fraction, spatial)
    rows = len(ids) * views
    return Plan(
        np.repeat(ids, views),
        np.full(rows, sampler.EVALUATION, np.int64),
        np.repeat(valid, views),
        np.repeat(frames, spatial, axis=1).reshape(rows, view.frames),
        np.tile(windows, (1, temporal, 1)).reshape(rows, 4),
        np.zeros(rows, bool),
    )


def run_plans(
    catalogue: Catalogue,
    view: ViewSpec,
    plan: Callable[[int], Plan],
    rows: int,
    device: torch.device,
    threads: int,
) -> Iterator[Batch]:
    """Run plan(0), plan(1), ... of `rows` samples each through one pipeline until StopIteration."""
    waiting: deque[Plan] = deque()  # handed to the graph, not yet come out of it

    def source(iteration: int) -> graph.Feed:
        waiting.append(plan(iteration))
        return feed_of(catalogue, waiting[-1])

    pipeline = graph.build_pipeline(
        source,
        batch=rows * view.frames,
        size=view.size,
        interpolation=view.interpolation,
        device=device,
        threads=threads or default_threads(),
    )
    while True:
        try:
            pixels = graph.run(pipeline, device)
        except StopIteration:
            return
        yield batch_of(catalogue, view, waiting.popleft(), pixels)


def feed_of(catalogue: Catalogue, plan: Plan) -> graph.Feed:
    """The frames of a batch, sample after sample; all frames of a sample get its window and flip."""
    per_sample = plan.frames.shape[1]
    rows = zip(plan.ids.tolist(), plan.frames.tolist(), strict=True)
    return graph.Feed(
        [catalogue.frame_bytes(sample, frame) for sample, frames in rows for frame in frames],
        np.repeat(plan.windows, per_sample, axis=0),
        np.repeat(plan.flips, per_sample),
    )


def batch_of(catalogue: Catalogue, view: ViewSpec, plan: Plan, pixels: torch.Tensor) -> Batch:
    """Put together what came out of the graph and what never went in."""
    if view.frames > 1:
        pixels = pixels.unflatten(0, (-1, view.frames))
    labels = torch.from_numpy(catalogue.label[plan.ids].astype(np.int64))
    return Batch(pixels, labels, plan.ids, plan.epochs, plan.valid)


def default_threads() -> int:
    """Decoding threads for this process: its share of the CPU cores it may use."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local)


def check_view(catalogue: Catalogue, view: ViewSpec) -> None:
    """Raise UserError when images are asked of clips, clips of images, or there is nothing to read."""
    wanted = "image" if view.frames == 1 else "video"
    root, kind = catalogue.info.root, catalogue.info.kind
    if kind != wanted:
        raise UserError(
            f"{root} holds {kind} shards, but this run reads {wanted} input; "
            f"choose a preset for {kind}s or shards of the other kind"
        )
    if len(catalogue) == 0:
        raise UserError(f"{root} has no readable {catalogue.split} sample; {catalogue.parquet} says why")
    if view.interpolation not in graph.INTERPOLATIONS:
        raise UserError(
            f"unknown interpolation {view.interpolation!r}; choose {', '.join(graph.INTERPOLATIONS)}"
        )


def short_clip_note(catalogue: Catalogue, view: ViewSpec) -> str | None:
    """One sentence about the clips too short for the view, or None when there are none."""
    counts = np.diff(catalogue.first_frame)
    span = (view.frames - 1) * view.stride + 1
    short = int((counts < span).sum())
    if view.frames == 1 or short == 0:
        return None
    return (
        f"{short} of {len(catalogue)} {catalogue.split} clips are shorter than {view.frames} frames x stride "
        f"{view.stride} ({span} frames): their stride shrinks to what fits, then the last frame repeats"
    )
