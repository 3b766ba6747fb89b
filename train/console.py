"""What a person sees: lines on the screen and in log.txt, a progress bar where there is a terminal."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BARS, CURVE = "▁▂▃▄▅▆▇█", 30


class Screen:
    """Rank 0's voice, on the screen and at the end of `log`; on other ranks every method does nothing."""

    def __init__(self, speaks: bool, log: Path) -> None:
        self._speaks = speaks
        self._console = Console(highlight=False, soft_wrap=True)
        self._file = log.open("a", buffering=1) if speaks else None
        self._progress: Progress | None = None
        self._losses: list[float] = []
        self._scores: list[str] = []

    def line(self, text: str) -> None:
        if not self._speaks:
            return
        self._console.print(text, markup=False)
        sys.stdout.flush()
        if self._file:
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
