"""What is measured along the way: sums on the device that nobody waits for, and a clock."""

import csv
import resource
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from pipelines.loader import Batch, mark
from train.distributed import World, gather

LOSS, NORM, BAD, GOOD, SKIPPED, IN_A_ROW = range(6)


class HostCopy:
    """Device values on their way to the host, float64 [n]; only `tolist` waits, and for this copy alone."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # from CUDA into pinned memory, unfinished
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    def tolist(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Meters:
    """Device-side metrics since the last row: the sum of losses and the number of good steps.

    Besides, over the whole run: the gradient norm of the last good step, replaced rows, skipped steps, and
    skipped steps in a row up to now. A good step is one that was not skipped.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(6, device=device, dtype=torch.float64)
        kept = [index not in (LOSS, GOOD) for index in range(6)]
        self._kept = torch.tensor(kept, device=device, dtype=torch.float64)

    def add(self, loss: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor, bad: int) -> None:
        """Count a step; `bad` is the number of its rows that stand in for damaged samples."""
        last = self.values
        good = 1.0 - skipped
        values = [
            last[LOSS] + loss.nan_to_num(0, 0, 0) * good,
            torch.where(good > 0, norm, last[NORM]),
            last[BAD] + bad,
            last[GOOD] + good,
            last[SKIPPED] + skipped,
            (last[IN_A_ROW] + skipped) * skipped,
        ]
        self.values = torch.stack(values)

    def gathered(self) -> torch.Tensor:
        """All processes' values [processes, 6], for a checkpoint; the loss is each one's own."""
        return gather(self.values)

    def restore(self, rows: torch.Tensor, rank: int, processes: int) -> None:
        """Take up this process's values again, or their mean where the number of processes changed."""
        values = rows[rank].clone() if len(rows) == processes else rows.mean(0)
        self.values = values.to(self.values.device)
        self.values[BAD] *= len(rows) / processes if len(rows) != processes else 1

    def take(self) -> HostCopy:
        """The values over all processes, the loss as a mean of good steps: NaN where there was none.

        Resets the loss and the number of good steps. Never waits for the device.
        """
        rows = self.gathered()
        taken = rows.mean(0)
        taken[LOSS] /= taken[GOOD]  # as many in every process, and the same norm
        taken[BAD] *= len(rows)
        self.values = self.values * self._kept  # an assignment by a list of indices would wait for the device
        return HostCopy(taken)


class Clock:
    """Elapsed training time over all resumes, and the time and data wait of the current interval.

    On a CPU the data wait is the time until the loader has given a batch. On CUDA the host runs ahead of the
    device, and its waiting costs nothing while the device has work. There the data wait is how long the
    device had nothing left to do until the batch was decoded: the time between two events on its stream.
    A wait counts once the device has been through it, which may be a few steps later.
    """

    def __init__(self, elapsed: float, device: torch.device | None = None) -> None:
        self._begin = time.perf_counter() - elapsed
        self._device = device
        self._coming: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # not yet counted
        self._memory = 0.0  # GB, the most of all rows
        self.waited = 0.0  # seconds waited for the loader since this process began
        self.skip()

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time that it took counts as data wait, on CUDA once the device got there."""
        begin, asked = time.perf_counter(), mark(self._device)
        batch = next(batches)
        if asked is None or batch.decoded is None:
            self.waited += time.perf_counter() - begin
        else:
            self._coming.append((asked, batch.decoded))
        self._count()
        return batch

    def _count(self) -> None:
        """Add the waits that the device has been through; this waits for none."""
        while self._coming and self._coming[0][1].query():
            asked, decoded = self._coming.popleft()
            self.waited += asked.elapsed_time(decoded) / 1e3

    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def skip(self) -> None:
        """Leave the time since the last mark or row (evaluation, saving) out of the step time."""
        self._count()
        self._mark, self._waited_before, self.steps = time.perf_counter(), self.waited, 0

    def row(self, step: int, batch: int, world: World, operations: float) -> dict:
        """Timing columns of the steps since the last row; `operations` is what one of them computes."""
        self._count()
        now, steps = time.perf_counter(), max(self.steps, 1)
        per_step = (now - self._mark) / steps
        self._memory = max(self._memory, _memory_gb(world.device))
        row = {
            "time": self.elapsed(),
            "step": step,
            "samples": step * batch,
            "samples_per_s": batch / per_step,
            "step_ms": per_step * 1e3,
            "data_wait_ms": (self.waited - self._waited_before) / steps * 1e3,
            "mfu": _share_of_peak(operations / per_step / world.size, world.device),
            "max_mem_gb": self._memory,
        }
        self.skip()
        return row


class Detail:
    """Every step of one process as rows of detail/rank-N-from-STEP.csv; a resume begins a file of its own."""

    def __init__(self, folder: Path, rank: int, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank-{rank}-from-{start:09d}.csv").open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(("step", "time", "loss", "data_wait_ms"))
        self._rows: list[tuple[int, float, float]] = []
        self._losses: list[torch.Tensor] = []
        self._waited = 0.0

    def add(self, step: int, loss: torch.Tensor, clock: Clock) -> None:
        """Note a step; its loss stays on the device until `write`."""
        self._rows.append((step, clock.elapsed(), (clock.waited - self._waited) * 1e3))
        self._waited = clock.waited
        self._losses.append(loss)

    def write(self) -> None:
        """Append the steps noted; the one wait for the device."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        for (step, seconds, waited), loss in zip(self._rows, losses, strict=True):
            self._csv.writerow((step, f"{seconds:.4f}", repr(loss), f"{waited:.3f}"))
        self._file.flush()
        self._rows, self._losses = [], []


def _share_of_peak(operations_per_s: float, device: torch.device) -> float | None:
    """Model FLOPs utilisation: the share of the device's bf16 peak, None where the peak is not known."""
    if device.type != "cuda":
        return None
    from models.macs import bf16_peak

    peak = bf16_peak(torch.cuda.get_device_name(device))
    return operations_per_s / peak if peak else None


def _memory_gb(device: torch.device) -> float:
    """All that a GPU has in use now, DALI's and NCCL's memory included; on a CPU the process's peak."""
    if device.type == "cuda":
        free, every = torch.cuda.mem_get_info(device)
        return (every - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
