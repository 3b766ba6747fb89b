"""Console and log file of rank 0: lines on the screen and in log.txt, a progress bar on a terminal."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BARS, CURVE = "▁▂▃▄▅▆▇█", 30


class Output:
    """stdout or stderr that keeps accepting text after its reader or terminal is gone."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.closed_by_reader = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._tolerant():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerant():
            self._stream.flush()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # EPIPE of a pipe, EIO of a terminal
            self.closed_by_reader = True
            with suppress(OSError, ValueError):  # else Python's own flush at exit would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def survive_closed_output() -> None:
    """Let training continue when the pipe or terminal that it prints to is closed."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)


class Screen:
    """Prints to the screen and appends to `log`; on other ranks than 0 every method does nothing."""

    def __init__(self, speaks: bool, log: Path) -> None:
        self._speaks = speaks
        self._console = Console(highlight=False, soft_wrap=True)
        self._file = log.open("a", buffering=1) if speaks else None
        self._progress: Progress | None = None
        self._losses: list[float] = []
        self._scores: list[str] = []
        self._noted = False

    def line(self, text: str) -> None:
        if not self._speaks:
            return
        self._console.print(text, markup=False)
        sys.stdout.flush()
        if self._file:
            if getattr(sys.stdout, "closed_by_reader", False) and not self._noted:
                self._file.write("the output was closed by its reader; training continues, and logs here\n")
                self._noted = True
            self._file.write(text + "\n")

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """Show a bar from step `done` to `total` while the block runs, if this is a terminal."""
        if not (self._speaks and self._console.is_terminal):
            yield
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console) as self._progress:
            self._task = self._progress.add_task("", total=total, completed=done)
            yield
        self._progress = None

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show(self, row: Mapping[str, float | None], loss: str) -> None:
        """Draw a metric row beside the bar: the curve of the column `loss`, the rate, the last evaluation."""
        self._losses = [*self._losses, row[loss] or 0.0][-CURVE:]
        scores = [f"{name} {row[name]:.4g}" for name in ("acc", "loss_val") if row.get(name) is not None]
        self._scores = scores or self._scores
        if self._progress is not None:
            words = [curve(self._losses), f"{row['samples_per_s']:.1f} samples/s", *self._scores]
            self._progress.update(self._task, description=" ".join(words))


def curve(values: list[float]) -> str:
    """The last values as a line of bars."""
    low, high = min(values), max(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in values)
