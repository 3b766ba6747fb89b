"""Plot the curves of one or several runs: python -m tools.plot runs/A [runs/B ...].

The color of a line shows its run, its style shows its column.
"""

import math
import re
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write
from tools.fonts import families
from train.metrics import read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # importing it takes a second


class Panel(NamedTuple):
    """A drawing: its columns share an axis. The unit "%" shows shares as percent."""

    title: str
    columns: tuple[str, ...]
    unit: str = ""
    logarithmic: bool = False


Tables = dict[str, list[dict]]  # run name -> metric rows
PANELS = (
    Panel("loss", ("loss_train", "loss", "loss_val")),
    Panel("accuracy", ("acc", "acc5"), "%"),
    Panel("learning rate", ("lr",)),
    Panel("gradient norm", ("grad_norm",), logarithmic=True),
    Panel("speed", ("samples_per_s",), "samples/s"),
    Panel("duration", ("step_ms", "data_wait_ms"), "ms"),
)
NOT_DRAWN = {"time", "step", "epoch", "samples", "mfu", "max_mem_gb", "skipped", "bad", "held_out"}
# Of the runs, on white and on a dark page: each has a contrast of at least 4.5 to 1 there.
COLORS = ("#0b62c4", "#b04a00", "#1a7a2e", "#8034b8", "#c4203a", "#007a85", "#6b6b00", "#b0268a")
DARK_COLORS = ("#6db3ff", "#ffa657", "#5fd07a", "#c9a0ff", "#ff8a94", "#4fd0d8", "#d0d060", "#ff8ad0")
STYLES: tuple[Literal["solid", "dashed", "dotted", "dashdot"], ...] = ("solid", "dashed", "dotted", "dashdot")
TICKS: dict[str, Any] = {"nbins": 6, "steps": [1, 2, 5, 10]}
FEW = 30  # with fewer points than this, a line also shows them


def plot(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Write a PNG with the curves of all runs over steps.

    Args:
        runs: run folders.
        out: picture to write; default: curves.png in the run folder, for several runs in their parent folder.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not runs:
        raise UserError("there are no runs; name at least one run folder, such as runs/image-mae-pico")
    if out and out.suffix.lower() != ".png":
        raise UserError(f"{out} does not end in .png; name such a file with OUT= (--out)")
    tables = {name: _read(run) for name, run in zip(names_of(runs), runs, strict=True)}
    panels = panels_of(tables)
    lines = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.2 * lines + 0.4), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        draw(figure.add_subplot(lines, 2, number), panel, tables)
    legend = [Line2D([], [], color=color, lw=3) for _, color in zip(tables, cycle(COLORS), strict=False)]
    names = [name.replace("$", r"\$") for name in tables]  # otherwise matplotlib reads formulas
    figure.legend(
        legend, names, loc="outside upper left", ncols=4, frameon=False, prop=families("".join(names))
    )
    path = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "curves.png"
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # `families` warns of them in one line
        figure.savefig(temporary, format="png", dpi=110)
    return path


def names_of(runs: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or its path if two folders have the same name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(runs) else list(map(str, runs))


def panels_of(tables: Tables) -> list[Panel]:
    """The panels for which any run has numbers.

    Columns that PANELS lacks share a panel if their names differ in a last number only.
    """
    rows = [row for rows in tables.values() for row in rows]
    filled = dict.fromkeys(name for row in rows for name in row if row[name] is not None)
    groups: dict[str, list[str]] = {}
    for name in filled:
        if name not in NOT_DRAWN and not any(name in panel.columns for panel in PANELS):
            groups.setdefault(re.sub(r"_?\d+$", "", name).replace("_", " "), []).append(name)
    others = [
        Panel(title, tuple(names), "%" if re.search("acc|probe", title) else "")
        for title, names in groups.items()
    ]
    return [panel for panel in (*PANELS, *others) if filled.keys() & {*panel.columns}]


def draw(axis: "Axes", panel: Panel, tables: Tables) -> None:
    """Draw the columns of one panel for every run, over all steps of the longest run."""
    from matplotlib import ticker
    from matplotlib.lines import Line2D

    per_step, over = _epochs_per_step(tables)
    filled = {name for rows in tables.values() for row in rows for name in row if row[name] is not None}
    styles = dict(zip((column for column in panel.columns if column in filled), cycle(STYLES), strict=False))
    for rows, color in zip(tables.values(), cycle(COLORS), strict=False):
        for column, style in styles.items():
            points = [(row[over], row[column]) for row in rows if row.get(column) is not None]
            marker = "." if len(points) < FEW else None
            axis.plot(*zip(*points, strict=True), color=color, linestyle=style, marker=marker)
    last = max((row[over] for rows in tables.values() for row in rows), default=1)
    unit = f" ({panel.unit})" if panel.unit else ""
    axis.set(ylabel=panel.title + unit, xlabel=over, xlim=(0, last * 1.02))
    _set_ticks(axis, panel)
    if per_step:
        epochs = axis.secondary_xaxis("top", functions=(partial(mul, per_step), partial(mul, 1 / per_step)))
        epochs.set_xlabel("epoch")
        epochs.xaxis.set_major_locator(ticker.MaxNLocator(**TICKS))
        epochs.xaxis.set_major_formatter(plain)
    axis.grid(alpha=0.3)
    if len(styles) > 1:
        ink = axis.yaxis.label.get_color()
        lines = [Line2D([], [], color=ink, linestyle=style) for style in styles.values()]
        axis.legend(lines, list(styles), fontsize="small", handlelength=3)


def _epochs_per_step(tables: Tables) -> tuple[float, str]:
    """Epochs per step if the runs agree, else 0, and the column to draw over.

    Runs with other batches or data are drawn over epochs.
    """
    lasts = [rows[-1] for rows in tables.values() if rows]
    if any(row.get("epoch") is None for row in lasts):
        return 0.0, "step"
    ratios = [row["epoch"] / row["step"] for row in lasts]
    agree = max(ratios, default=0.0) <= 1.0001 * min(ratios, default=0.0)
    return (ratios[0], "step") if ratios and agree else (0.0, "epoch")


def _set_ticks(axis: "Axes", panel: Panel) -> None:
    from matplotlib import ticker

    axis.xaxis.set_major_locator(ticker.MaxNLocator(**TICKS))
    axis.xaxis.set_major_formatter(plain)
    if panel.logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    low, high = axis.get_ylim()
    if panel.logarithmic and high > 20 * low:
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    else:
        axis.yaxis.set_major_locator(ticker.MaxNLocator(**TICKS))
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol="") if panel.unit == "%" else plain)


def plain(value: float, _: float = 0) -> str:
    """A tick's label without powers of ten: 0.0005, 20,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _read(run: Path) -> list[dict]:
    path = run / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder, such as RUN=image-mae-pico")
    if rows := read_csv(path):
        return rows
    raise UserError(f"{path} has no rows yet; wait for the run's first metric row")


if __name__ == "__main__":
    run_cli(lambda: print(tyro.cli(plot)))
