"""Plans an epoch of LAION-400M on 1,024 processes: python -m benchmarks.scale [--samples N --ranks N]

The catalogue's columns are sparse files of the size they would have, with true shard numbers; no picture is
needed to plan. Told are the time until a process has its first batch, the time per batch at several ranks,
the memory that takes, and the time that the order of a whole epoch takes, in which every sample must come
exactly once. A run resumed in the middle, on half the processes, must draw the same rows.
"""

import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from pipelines import order
from pipelines.config import DataConfig
from pipelines.dataset import Dataset, DatasetInfo
from pipelines.errors import UserError, run_cli
from pipelines.views import Rows, train_rows

TYPES: dict[str, type[np.number]] = {
    **dict.fromkeys(("shard", "label", "width", "height", "size"), np.int32),
    **dict.fromkeys(("first_frame", "offset"), np.int64),
    "crc": np.uint32,
}
PART = 65_536  # positions ordered at once: they fit a core's cache
WINDOW = 4096
SEED = 0


def make_columns(folder: Path, samples: int, per_shard: int) -> None:
    """One file a column: shard numbers, and holes that read as zeros."""
    folder.mkdir(parents=True)
    for name, kind in TYPES.items():
        with (folder / name).open("wb") as file:
            file.truncate((samples + (name == "first_frame")) * np.dtype(kind).itemsize)
    shards = np.memmap(folder / "shard", TYPES["shard"], "r+")
    for first in range(0, samples, 1 << 24):
        ids = np.arange(first, min(samples, first + (1 << 24)))
        shards[ids] = ids // per_shard


def open_columns(folder: Path) -> Dataset:
    columns = {name: np.asarray(np.memmap(folder / name, kind, "r")) for name, kind in TYPES.items()}
    return Dataset(DatasetInfo(folder, "image", (), {}, {}, {}), "train", **columns)


def memory() -> dict[str, int]:
    """This process's memory in MB: its own, and pages of files, which processes share."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = dict(line.split(":", 1) for line in lines)
    return {name: int(held[name].split()[0]) // 1000 for name in ("RssAnon", "RssFile", "VmHWM")}


def rank_plan(
    catalogue: Dataset, arrange: order.Order, step: int, batch: int, rank: int, ranks: int, parts: int = 1
) -> Rows:
    """What the loader works out for a rank's step, micro batches one after the other."""
    positions = order.batch_positions(step, batch, rank, ranks, parts).ravel()
    epochs, ids = arrange(positions)
    return train_rows(catalogue, DataConfig(), SEED, ids, epochs)


def check_resume(catalogue: Dataset, arrange: order.Order, step: int, batch: int, ranks: int) -> None:
    """Hold a step's rows on `ranks` processes against those on half as many with two micro batches."""
    drawn = []
    for count, parts in ((ranks, 1), (ranks // 2, 2)):
        plans = [rank_plan(catalogue, arrange, step, batch, rank, count, parts) for rank in range(count)]
        drawn.append(
            [np.concatenate([getattr(p, name) for p in plans]) for name in ("ids", "epochs", "flips")]
        )
    if not all((one == other).all() for one, other in zip(*drawn, strict=True)):
        raise UserError(
            f"step {step} draws other rows on {ranks // 2} processes: this is a defect, report it"
        )


def whole_epoch(arrange: order.Order, samples: int) -> float:
    """Seconds to order a whole epoch; as many draws as samples, none missing: each exactly once."""
    seen = np.zeros(samples, bool)
    seconds = 0.0
    for first in range(0, samples, PART):
        start = time.perf_counter()
        epochs, ids = arrange(np.arange(first, min(samples, first + PART)))
        seconds += time.perf_counter() - start
        seen[ids] = True
        if epochs.any():
            raise UserError("an epoch ends early: this is a defect, report it")
    if not seen.all():
        raise UserError(
            f"{np.count_nonzero(~seen)} samples do not come in an epoch: this is a defect, report it"
        )
    return seconds


def bench(
    samples: int = 400_000_000,
    ranks: int = 1024,
    batch: int = 4096,
    per_shard: int = 1000,
    work: Path = Path("/tmp/hiera-train-scale"),
) -> None:
    """Measure and print a table; raises UserError when an order is not exact.

    Args:
        samples: pictures in the catalogue.
        ranks: processes, an even number that divides batch.
        batch: samples of a step over all processes.
        per_shard: pictures in a shard.
        work: folder for the columns, of which the shard numbers take 4 bytes a picture; removed at the end.
    """
    if ranks % 2 or batch % ranks:
        raise UserError(f"--ranks {ranks} must be even and divide --batch {batch}.")
    table = Table(title=f"{samples:,} pictures, {ranks:,} processes, {batch // ranks} a step and process")
    for head in (
        "order",
        "first batch (s)",
        "peak then (MB)",
        "batch (ms)",
        "own (MB)",
        "pages (MB)",
        "epoch (s)",
    ):
        table.add_column(head, justify="left" if head == "order" else "right")
    try:
        make_columns(work, samples, per_shard)
        for name in ("random", "local"):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before, start = memory(), time.perf_counter()
            catalogue = open_columns(work)
            arrange = order.make_order(name, catalogue.shard, SEED, WINDOW)
            middle = samples // batch // 2
            rank_plan(catalogue, arrange, middle, batch, 0, ranks)
            first, peak = time.perf_counter() - start, memory()
            times = []
            for rank in (0, 1, ranks // 2, ranks - 1):
                for step in range(middle, middle + 250):
                    start = time.perf_counter()
                    rank_plan(catalogue, arrange, step, batch, rank, ranks)
                    times.append(time.perf_counter() - start)
            after = memory()
            check_resume(catalogue, arrange, middle, batch, ranks)
            print(f"{name}: an epoch ...", file=sys.stderr, flush=True)
            seconds = whole_epoch(arrange, samples)
            grown = [after[part] - before[part] for part in ("RssAnon", "RssFile")]
            cells = [f"{first:.2f}", peak["VmHWM"] - before["RssAnon"] - before["RssFile"]]
            cells += [f"{1e3 * statistics.median(times):.2f}", *grown, f"{seconds:.1f}"]
            table.add_row(name, *map(str, cells))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(bench, description=__doc__))
