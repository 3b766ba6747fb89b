"""The command line, the console of rank 0, and a log file per rank.

`log` prints a line on rank 0. While a run is open, every rank appends its lines and stderr to its log file.
"""

import atexit
import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipelines.errors import UserError, once_per_machine, printable
from train.config import Config, flatten, hint, to_dict

BARS, CURVE = "▁▂▃▄▅▆▇█", 16


class Output:
    """stdout or stderr that keeps accepting text after its reader or terminal is closed.

    label: put before every line, such as the rank; copy: also called with every text that is written.
    """

    def __init__(self, stream: Any, label: str = "", copy: Callable[[str], object] | None = None) -> None:
        self._stream, self.closed_by_reader = stream, False
        self._label, self._copy, self._begins = label, copy, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._tolerant():
            self._stream.write(self._labelled(text) if self._label else text)
        if self._copy is not None:
            self._copy(text)
        return len(text)

    def _labelled(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        labels = [self._label * (number > 0 or self._begins) for number in range(len(lines))]
        self._begins = text.endswith("\n") if text else self._begins
        return "".join(map(str.__add__, labels, lines))

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
    """Let training continue when the pipe or terminal that it prints to is closed.

    stderr is copied to the log file of this rank, and its lines begin with the rank unless that is 0.
    """
    rank = os.environ.get("RANK", "0")
    label = "" if rank == "0" else f"[rank {rank}] "
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, label, screen.copy)


class Screen:
    """Lines on stdout and in a log file, and on a terminal a panel below them. Only rank 0 prints."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._losses: list[float] = []
        self._values: dict[str, str] = {}
        self._noted = False

    def open(self, path: Path) -> None:
        """Append the lines from here on to `path`, until `close`."""
        self.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._losses, self._values, self._noted = path.open("a", buffering=1), [], {}, False

    def close(self) -> None:
        """Close the log file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def line(self, text: str) -> None:
        """Print a line on rank 0, and append it to the log file if one is open."""
        if self._active:
            self._console.print(text, markup=False)
            sys.stdout.flush()
        if getattr(sys.stdout, "closed_by_reader", False) and not self._noted:
            self.copy("the output was closed by its reader; training continues, and logs here\n")
            self._noted = True
        self.copy(text + "\n")

    def copy(self, text: str) -> None:
        """Append text to the log file if one is open."""
        if self._file is not None:
            self._file.write(printable(text))

    @property
    def _active(self) -> bool:
        return os.environ.get("RANK", "0") == "0"

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """Show the panel from step `done` to `total` while the block runs, if this is a terminal."""
        if not (self._active and self._console.is_terminal):
            yield
            return
        left = TextColumn("time left")
        columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("steps,"), left, TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, expand=True, speed_estimate_period=600)
        self._task = self._progress.add_task("", total=total, completed=done)
        try:
            with Live(console=self._console, get_renderable=self.panel, refresh_per_second=2):
                yield
        finally:
            self._progress = None

    def panel(self) -> Panel:
        """The bar and the values of the last metric row, at most 80 columns wide."""
        table = Table.grid(padding=(0, 2), expand=True)
        pairs = list(self._values.items())
        for left, right in zip(pairs[::2], pairs[1::2], strict=True):
            table.add_row(*left, *right)
        parts = [table] if self._progress is None else [self._progress, table]
        return Panel(Group(*parts), width=min(80, self._console.width))

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show(self, row: Mapping[str, float | None], loss: str, best: str) -> None:
        """Show a metric row in the panel, with the curve of the column `loss`.

        best: the best evaluation as text, empty if the row has no evaluation.
        """
        self._losses = [*self._losses, row[loss] or 0.0][-CURVE:]
        scores = [f"{name} {row[name]:.4g}" for name in ("acc", "loss_val") if row.get(name) is not None]
        evaluated = {"last": ", ".join(scores), "best": best.removeprefix("best ")} if scores else {}
        self._values |= {
            "loss": f"{self._losses[-1]:.4g} {curve(self._losses)}",
            "lr": f"{row['lr']:.3g}",
            "speed": f"{row['samples_per_s']:.1f} samples/s",
            "wait": f"{(row['data_wait_ms'] or 0) / (row['step_ms'] or 1):.0%} of a step",
            "memory": f"{row['max_mem_gb']:.1f} GiB",
            "epoch": f"{row['epoch']:.4g}",
            **evaluated,
        }


def curve(values: list[float]) -> str:
    """The values as a line of bars."""
    low, high = min(values), max(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in values)


def command_of(folder: Path, target: str, module: str, **options: object) -> str:
    """A command for a run folder, to print: a target of make, which looks in runs/ only, or a module."""
    if folder.is_relative_to("runs"):
        flags = [f"{name.upper()}={value}" for name, value in options.items()]
        return " ".join([f"make {target} RUN={folder.relative_to('runs')}", *flags])
    flags = [f"--{name} {value}" for name, value in options.items()]
    return " ".join([f"python -m {module} {folder}", *flags])


screen = Screen()
atexit.register(screen.close)  # after an error the run does not close it
log = screen.line


# ---- the command line


@once_per_machine()
def parse(presets: Mapping[str, Config], program: str, not_given: Mapping[str, str] | None = None) -> Config:
    """Read `PRESET [--dotted.overrides]` from the command line; raises UserError on unknown words.

    not_given: names of presets that do not exist, and why.
    """
    import tyro

    name, *overrides = sys.argv[1:] or [""]
    usage = f"usage: python -m {program} PRESET [--dotted.overrides]; presets: {', '.join(presets)}"
    if name in ("-h", "--help"):
        print(f"{usage}\nEvery setting of a preset: python -m {program} PRESET --help")
        sys.exit(0)
    if not name or name.startswith("-"):
        raise UserError(f"name a preset first; {usage}")
    if name not in presets:
        if why := (not_given or {}).get(name):
            raise UserError(f"there is no preset '{name}': {why}")
        kind = "ft" if "-ft-" in name else "mae" if "-mae-" in name else ""
        if kind and not any(f"-{kind}-" in known for known in presets):
            raise UserError(f"'{name}' is for make train-{kind}; presets here: {', '.join(presets)}")
        raise UserError(f"unknown preset '{name}'{hint(name, presets)}; presets: {', '.join(presets)}")
    preset = presets[name]
    preset = dataclasses.replace(preset, run=dataclasses.replace(preset.run, name=name))
    config, unknown = tyro.cli(
        type(preset),
        default=preset,
        args=overrides,
        prog=f"python -m {program} {name}",
        return_unknown_args=True,
        config=(tyro.conf.FlagConversionOff,),
        registry=_any_choice(),
    )
    if unknown:
        flags = [f"--{key.replace('_', '-')}" for key in flatten(to_dict(preset))]
        raise UserError(f"unknown argument '{unknown[0]}'{hint(unknown[0].split('=')[0], flags)}")
    return config


def _any_choice() -> typing.Any:
    """Let tyro accept any word for a Literal: the settings check it, and their error is one line."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if typing.get_origin(info.type) is not typing.Literal:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{{','.join(typing.get_args(info.type))}}}",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda word: [word],
        )

    return registry
