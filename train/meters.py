"""Metrics of a run: sums on the device that no step waits for, step timing, and the rows made of them."""

import csv
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pipelines.loader import Batch, mark
from train import distributed
from train.config import RunConfig
from train.console import log, screen
from train.distributed import World, gather
from train.metrics import HEALTH_COLUMNS, TIMING_COLUMNS, MetricsWriter, Row, best_text

LOSS, NORM, BAD, GOOD, SKIPPED, IN_A_ROW = range(6)
# Columns that are not printed.
HIDDEN = (*TIMING_COLUMNS, "samples", "step", "skipped", "bad", "held_out", *HEALTH_COLUMNS[:-1])


class HostCopy:
    """Device values on their way to the host, float64 [n]; only `tolist` waits, and only for this copy."""

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
    """Sums on the device since the last row: the losses, and the number of good steps.

    For the whole run it also has the gradient norm of the last good step, the replaced rows, the skipped
    steps, and the number of skipped steps in a row up to now. A good step is one that was not skipped.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(6, device=device, dtype=torch.float64)
        self.steps: list[torch.Tensor] = []  # loss and `skipped` of each step since the last row
        kept = [index not in (LOSS, GOOD) for index in range(6)]
        self._kept = torch.tensor(kept, device=device, dtype=torch.float64)

    def add(self, loss: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor, bad: int) -> None:
        """Count a step; `bad` is the number of its rows that replace damaged samples."""
        self.steps += (loss, skipped)
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
        """All processes' values [processes, 6], for a checkpoint; each process has its own loss."""
        return gather(self.values)

    def restore(self, rows: torch.Tensor, rank: int, processes: int) -> None:
        """Take this rank's values from a checkpoint; their mean if the number of processes changed."""
        values = rows[rank].clone() if len(rows) == processes else rows.mean(0)
        self.values = values.to(self.values.device)
        self.values[BAD] *= len(rows) / processes if len(rows) != processes else 1

    def last_step(self) -> list[float]:
        """Loss and `skipped` of the last step, the mean over all processes; waits for the device."""
        return gather(torch.stack(self.steps[-2:]).double()).mean(0).tolist()

    def flush(self) -> HostCopy:
        """The values over all processes, the loss as the mean of good steps: NaN if there was none.

        After them, loss and `skipped` of every step since the last row. Resets the loss, the number of good
        steps and the steps. Never waits for the device.
        """
        steps = torch.stack(self.steps).double() if self.steps else self.values[:0]
        rows = gather(torch.cat([self.values, steps]))
        means = rows.mean(0)
        means[LOSS] /= means[GOOD]  # the number of good steps, like the norm, is equal on all ranks
        means[BAD] *= len(rows)
        self.steps = []
        self.values = self.values * self._kept  # an assignment by a list of indices would wait for the device
        return HostCopy(means)


class Clock:
    """Training time over all resumes, and the step time and data wait of the current interval.

    On the CPU the data wait is the time until the loader gives a batch. On CUDA the host runs ahead of the
    device, and its waiting costs nothing while the device has work. There the data wait is the time between
    two events on the device's stream: from when it had no work left to when the batch was decoded. The wait
    is counted once the device has passed both events, which may be a few steps later.
    """

    def __init__(self, elapsed: float, device: torch.device | None = None) -> None:
        self._begin = time.perf_counter() - elapsed
        self._device = device
        self._coming: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # not yet counted
        self._memory = 0.0  # GiB, the most of all rows
        self.waited = 0.0  # seconds waited for the loader since this process began
        self.rows = 0  # since this process began
        self.skip()

    def take(self, batches: Iterator[Batch], count: int) -> Iterator[Batch]:
        """The next `count` micro batches, which are a step; the wait for each is counted."""
        for _ in range(count):
            yield self.wait(batches)
        self.steps += 1

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; its data wait is counted, on CUDA once the device has passed it."""
        begin, start = time.perf_counter(), mark(self._device)
        batch = next(batches)
        if start is None or batch.decoded is None:
            self.waited += time.perf_counter() - begin
        else:
            self._coming.append((start, batch.decoded))
        self._count()
        return batch

    def _count(self) -> None:
        """Add the waits that the device has passed, without waiting for the device."""
        while self._coming and self._coming[0][1].query():
            start, decoded = self._coming.popleft()
            self.waited += start.elapsed_time(decoded) / 1e3

    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def skip(self) -> None:
        """Leave the time since the last row or skip (evaluation, saving) out of the step time."""
        self._count()
        self._mark, self._waited_before, self.steps = time.perf_counter(), self.waited, 0

    def row(self, step: int, batch: int, world: World, operations: float) -> dict:
        """Timing columns of the steps since the last row; `operations` is the cost of one step."""
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
        self.rows += 1
        self.skip()
        return row


class Detail:
    """Every step of one process as rows of detail/rank-N-from-STEP.csv; each resume starts a new file."""

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
        """Append the noted steps; this waits for the device."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        for (step, seconds, waited), loss in zip(self._rows, losses, strict=True):
            self._csv.writerow((step, f"{seconds:.4f}", repr(loss), f"{waited:.3f}"))
        self._file.flush()
        self._rows, self._losses = [], []


class Recorder:
    """Turns the meters into metric rows and printed lines; a row is read one step after it was begun."""

    def __init__(
        self, settings: RunConfig, world: World, loss_column: str, metrics: MetricsWriter | None, steps: int
    ) -> None:
        """metrics: on rank 0; steps: of the whole run."""
        self._settings, self._world, self._loss_column = settings, world, loss_column
        self._metrics, self._steps = metrics, steps
        self._pending: tuple[dict, HostCopy] | None = None
        self.saved = 0  # step of the last checkpoint
        self.inspect: Callable[[int, float], None] | None = None  # (step, loss): for the first bad step

    def begin(self, row: dict, meters: Meters) -> None:
        """Begin a row; its values are copied to the host in the background."""
        self._pending = (row, meters.flush())

    def finish(self) -> dict | None:
        """The row that `begin` began, complete except for scores, or None if there is none.

        Raises UserError after run.max_skipped non-finite steps in a row, and when the run ends without a good
        step.
        """
        if self._pending is None:
            return None
        row, values = self._pending
        self._pending = None
        loss, norm, bad, _, skipped, in_a_row, *steps = values.tolist()
        self._look(row["step"], steps)
        if math.isnan(loss):  # every step since the last row was skipped
            loss = norm = None
        row |= {self._loss_column: loss, "grad_norm": norm, "skipped": int(skipped), "bad": round(bad)}
        if in_a_row >= self._settings.max_skipped or skipped >= self._steps:
            self._fail(row["step"], int(in_a_row))
        return row

    def _look(self, step: int, steps: list[float]) -> None:
        """Call `inspect` for the first bad step of this start; `steps` end with those of `step`."""
        pairs = list(zip(steps[::2], steps[1::2], strict=True))
        for number, (loss, skipped) in enumerate(pairs, start=step - len(pairs) + 1):
            if self.inspect is not None and (skipped or not math.isfinite(loss)):
                inspect, self.inspect = self.inspect, None
                inspect(number, loss)

    def settle(self) -> None:
        """Write the row that `begin` began, if there is one."""
        if (row := self.finish()) is not None:
            self.write(row)

    def write(self, row: dict, best: Row | None = None) -> None:
        """Append a complete row to the metrics and print it, with the row of the best evaluation so far."""
        if self._metrics is not None:
            self._metrics.write(row)
        shown = {k: v for k, v in row.items() if k not in HIDDEN and v is not None}
        text = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
        wait = 100 * row["data_wait_ms"] / row["step_ms"]
        text += f" | {row['samples_per_s']:.1f} samples/s, data wait {wait:.0f} %"
        counts = {"steps skipped": row["skipped"], "damaged samples replaced": row["bad"]}
        faults = "".join(f", {count} {what}" for what, count in counts.items() if count)
        log(f"step {row['step']}: {text}{faults}{f' | {best_text(best)}' if best else ''}")
        screen.show(row, self._loss_column, best_text(best or {}))

    def _fail(self, step: int, in_a_row: int) -> None:
        log(f"step {step}: {in_a_row} steps in a row had non-finite gradients")
        folder = self._settings.folder / "checkpoints"
        last = f"the last checkpoint in {folder} is of step {self.saved}, before them"
        distributed.fail(
            self._world,
            f"the last {in_a_row} steps up to step {step} had non-finite gradients "
            f"({last if self.saved else 'no checkpoint was saved'}); lower optim.lr, set optim.clip_norm or "
            "use speed.precision fp32",
        )


def _share_of_peak(operations_per_s: float, device: torch.device) -> float | None:
    """Model FLOPs utilization: the share of the device's bf16 peak, None if the peak is unknown."""
    if device.type != "cuda":
        return None
    from models.zoo import bf16_peak

    peak = bf16_peak(torch.cuda.get_device_name(device))
    return operations_per_s / peak if peak else None


def _memory_gb(device: torch.device) -> float:
    """GiB that are in use on a GPU now, with DALI's and NCCL's memory; on the CPU the process's peak."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
