"""Metric rows: taken on the device, read one step later, then written and shown."""

import math

from train import distributed, rundir
from train.config import Config
from train.console import Screen
from train.distributed import World
from train.meters import HostCopy, Meters
from train.metrics import TIMING_COLUMNS, MetricsWriter

HIDDEN = (*TIMING_COLUMNS, "samples", "step", "skipped", "bad", "held_out")


class Recorder:
    """Turns the meters into rows of `metrics` (rank 0 only) and lines on the screen."""

    def __init__(
        self,
        config: Config,
        world: World,
        loss_column: str,
        metrics: MetricsWriter | None,
        screen: Screen,
        steps: int,
    ) -> None:
        self._config, self._world, self._loss_column = config, world, loss_column
        self._metrics, self._screen, self._steps = metrics, screen, steps
        self._pending: tuple[dict, HostCopy] | None = None
        self.saved = 0  # step of the last checkpoint

    def take(self, row: dict, meters: Meters) -> None:
        """Begin a row; its numbers are copied to the host in the background."""
        self._pending = (row, meters.take())

    def finish(self) -> dict | None:
        """The row begun by `take`, complete but for scores, or None if there is none.

        Raises UserError after run.max_skipped non-finite steps in a row, and if the run ends without a good
        one.
        """
        if self._pending is None:
            return None
        row, values = self._pending
        self._pending = None
        loss, norm, bad, _, skipped, in_a_row = values.tolist()
        if math.isnan(loss):  # every step since the last row was skipped
            loss = norm = None
        row |= {self._loss_column: loss, "grad_norm": norm, "skipped": int(skipped), "bad": round(bad)}
        if in_a_row >= self._config.run.max_skipped or skipped >= self._steps:
            self._fail(row["step"], int(in_a_row))
        return row

    def settle(self) -> None:
        """Write the row begun by `take`, if there is one."""
        if (row := self.finish()) is not None:
            self.write(row)

    def write(self, row: dict) -> None:
        """Append a complete row to the metrics and show it."""
        if self._metrics is not None:
            self._metrics.write(row)
        shown = {k: v for k, v in row.items() if k not in HIDDEN and v is not None}
        text = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
        wait = 100 * row["data_wait_ms"] / row["step_ms"]
        text += f" | {row['samples_per_s']:.1f} samples/s, data wait {wait:.0f} %"
        counts = {"steps skipped": row["skipped"], "damaged samples replaced": row["bad"]}
        faults = "".join(f", {count} {what}" for what, count in counts.items() if count)
        self._screen.line(f"step {row['step']}: {text}{faults}")
        self._screen.show(row, self._loss_column)

    def _fail(self, step: int, in_a_row: int) -> None:
        self._screen.line(f"step {step}: {in_a_row} steps in a row had non-finite gradients")
        folder = rundir.folder_of(self._config) / "checkpoints"
        last = f"the last checkpoint in {folder} is of step {self.saved}, before them"
        distributed.fail(
            self._world,
            f"the last {in_a_row} steps up to step {step} had non-finite gradients "
            f"({last if self.saved else 'no checkpoint was saved'}); lower optim.lr, set optim.clip_norm or "
            "use speed.precision fp32",
        )
