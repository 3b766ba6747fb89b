"""Plot the curves of one or several runs: python -m tools.plot runs/A [runs/B ...]."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write
from train.metrics import read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # importing it takes a second

Panel = tuple[str, tuple[str, ...], bool]
Tables = dict[str, list[dict]]  # run name -> metric rows
# (title, columns, logarithmic); a panel without numbers is left out.
PANELS: tuple[Panel, ...] = (
    ("loss", ("loss_train", "loss", "loss_val"), False),
    ("accuracy", ("acc", "acc5"), False),
    ("learning rate", ("lr",), False),
    ("gradient norm", ("grad_norm",), True),
    ("samples per second", ("samples_per_s",), False),
    ("step and data wait, ms", ("step_ms", "data_wait_ms"), False),
)


def plot(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Write a PNG with the curves of all runs over steps.

    Args:
        runs: run folders.
        out: picture to write; default: curves.png in the run folder, for several runs in their parent folder.
    """
    from matplotlib.figure import Figure

    if not runs:
        raise UserError("there are no runs; name at least one run folder, such as runs/image-mae-pico")
    tables = {run.name: _read(run) for run in runs}
    panels = panels_of(tables)
    lines = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.2 * lines))
    for number, panel in enumerate(panels, start=1):
        draw(figure.add_subplot(lines, 2, number), panel, tables)
    figure.suptitle(", ".join(tables))
    figure.tight_layout()
    path = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "curves.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def panels_of(tables: Tables) -> list[Panel]:
    """The panels for which any run has numbers."""
    filled = {name for rows in tables.values() for row in rows for name in row if row[name] is not None}
    return [panel for panel in PANELS if filled & {*panel[1]}]


def draw(axis: "Axes", panel: Panel, tables: Tables) -> None:
    """Draw the columns of one panel over steps, for every run."""
    title, columns, logarithmic = panel
    for name, rows in tables.items():
        for column in columns:
            points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
            if points:
                label = column if len(tables) == 1 else f"{name} {column}"
                marker = "." if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), label=label, marker=marker)
    axis.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _read(run: Path) -> list[dict]:
    path = run / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder, such as RUN=image-mae-pico")
    if rows := read_csv(path):
        return rows
    raise UserError(f"{path} has no rows yet; wait for the run's first metric row")


if __name__ == "__main__":
    run_cli(lambda: print(tyro.cli(plot)))
