"""Traces and memory snapshots of chosen steps: --speed.profile FIRST:LAST."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from train.config import Config
from train.console import log
from train.distributed import World

EVENTS = 200_000  # allocations that a memory snapshot holds


def profiled(steps: Iterator[int], config: Config, world: World) -> Iterator[int]:
    """The same steps; those of speed.profile are profiled on rank 0, into profile/ of the run folder.

    The trace, *.pt.trace.json, opens in Perfetto, chrome://tracing and TensorBoard's profiler plugin. The
    snapshot of a GPU's memory, *.pickle, opens at pytorch.org/memory_viz.
    """
    chosen = config.speed.profiled
    if not chosen or not world.is_main:
        return steps
    return profile(steps, chosen, config.run.folder / "profile", world.device)


def profile(steps: Iterator[int], chosen: range, folder: Path, device: torch.device) -> Iterator[int]:
    """The same steps; the `chosen` ones are profiled, into `folder`."""
    with ExitStack() as stack:
        profiler = None
        for step in steps:
            if profiler is None and step in chosen:
                profiler = stack.enter_context(_profiler(f"steps-{step}-{chosen[-1]}", folder, device))
            yield step
            if step == chosen[-1]:
                break
            if profiler is not None:
                profiler.step()  # marks the next step in the trace
    if profiler is None:
        log(f"no step was profiled: the run ended before step {chosen[0]} or resumed after step {chosen[-1]}")
    yield from steps


@contextmanager
def _profiler(name: str, folder: Path, device: torch.device) -> Iterator[torch.profiler.profile]:
    """A profiler of the block, which writes its files at the end of the block."""
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + cuda]
    save = torch.profiler.tensorboard_trace_handler(str(folder), worker_name=name)
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=EVENTS)
    try:
        with torch.profiler.profile(
            activities=kinds, schedule=_always, record_shapes=True, on_trace_ready=save
        ) as profiler:
            yield profiler
    finally:
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
    log(f"profiled {name}: {folder}")


def _always(_step: int) -> torch.profiler.ProfilerAction:
    """A schedule: without one the profiler does not mark the steps."""
    return torch.profiler.ProfilerAction.RECORD
