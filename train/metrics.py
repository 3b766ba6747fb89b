"""Metric rows on disk: a CSV that can be read while it grows, and the same rows as a Parquet dataset."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.files import atomic_write

INTEGERS = ("step", "samples", "skipped", "bad", "held_out")
SPEED = ("samples_per_s", "step_ms", "data_wait_ms", "mfu", "max_mem_gb")
COMMON = ("epoch", "samples", "grad_norm", *SPEED, "skipped", "bad")
HEALTH_COLUMNS = (
    *(f"health_{kind}_stage{n}" for kind in ("rank", "std") for n in range(1, 5)),
    "health_probe",
)
MAE_COLUMNS = ("time", "step", "loss_train", "lr", "loss_val", *COMMON, *HEALTH_COLUMNS)
FINETUNE_COLUMNS = ("time", "step", "loss", "lr", "acc", *COMMON, "acc5", "loss_val", "held_out")
TIMING_COLUMNS = ("time", *SPEED)

Row = Mapping[str, float | int | None]


class MetricsWriter:
    """Appends rows to `metrics.csv` at once, and to `metrics/part-*.parquet` at each `commit`.

    When a run resumes after `step`, the later rows are first dropped from both, because those steps are done
    again. `kept` are the rows that remain. `followers` are called with every row that is written.
    """

    def __init__(self, run: Path, columns: tuple[str, ...], step: int) -> None:
        self.columns = columns
        self.followers: list[Callable[[Row], None]] = []
        self.folder = run / "metrics"
        self.folder.mkdir(exist_ok=True)
        path = run / "metrics.csv"
        resumes = path.exists() and step
        self.kept = rows = [row for row in read_csv(path) if row["step"] <= step] if resumes else []
        with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *[_texts(row, columns) for row in rows]])
        for part in self.folder.glob("*.parquet"):
            part.unlink()
        self._uncommitted = rows
        self.commit()
        self._file = path.open("a", newline="")
        self._csv = csv.writer(self._file)

    def write(self, row: Row) -> None:
        """Append one row; `None` and missing columns stay empty. A value without a column is a mistake."""
        unknown = sorted(set(row) - set(self.columns))
        assert not unknown, f"no column for {unknown}; add them to MAE_COLUMNS or FINETUNE_COLUMNS"
        self._csv.writerow(_texts(row, self.columns))
        self._file.flush()
        self._uncommitted.append(dict(row))
        for follower in self.followers:
            follower(row)

    def commit(self) -> None:
        """Write the rows since the last commit as a Parquet part."""
        if self._uncommitted:
            path = self.folder / f"part-{self._uncommitted[-1]['step']:09d}.parquet"
            with atomic_write(path) as temporary:
                pq.write_table(_table(self._uncommitted, self.columns), temporary)
            self._uncommitted = []

    def close(self) -> None:
        """Commit, then merge the parts into one."""
        self.commit()
        self._file.close()
        parts = sorted(self.folder.glob("part-*.parquet"))
        if len(parts) > 1:
            table = pa.concat_tables([pq.read_table(part) for part in parts])
            # The merged file takes the last part's name. A crash before the next lines leaves older parts,
            # which the next start removes.
            with atomic_write(parts[-1]) as temporary:
                pq.write_table(table, temporary)
            for part in parts[:-1]:
                part.unlink()


def score(row: Row) -> float:
    """The value that the best evaluation maximizes: accuracy, or minus the validation loss.

    -inf without an evaluation, or if it gave NaN.
    """
    accuracy, loss = row.get("acc"), row.get("loss_val")
    if loss is None or not math.isfinite(loss):
        return -math.inf
    return -loss if accuracy is None else accuracy


def best_of(rows: Iterable[Row]) -> Row:
    """The row with the best evaluation, the first of equal ones; empty if no row has an evaluation."""
    best = max(rows, key=score, default={})
    return best if score(best) > -math.inf else {}


def best_text(best: Row) -> str:
    """What `best_of` found, as "best acc 0.9331 at step 300"; empty if it found none."""
    if not best:
        return ""
    name = "loss_val" if best.get("acc") is None else "acc"
    return f"best {name} {best[name]:.4g} at step {best['step']}"


def read_csv(path: Path) -> list[dict]:
    """The rows of a metrics.csv: numbers parsed, empty fields None; incomplete lines are dropped."""
    rows = []
    with path.open(newline="", errors="replace") as file:
        lines = (line.rstrip("\r\n").split(",") for line in file if line.endswith("\n"))
        header = next(lines, [])
        for row in lines:
            with suppress(ValueError):  # a line that was cut off or damaged
                rows.append({k: _number(k, v) for k, v in zip(header, row, strict=True)})
    return rows


def _number(column: str, text: str) -> float | int | None:
    if text == "":
        return None
    return int(text) if column in INTEGERS else float(text)


def _texts(row: Row, columns: tuple[str, ...]) -> list[str]:
    return ["" if row.get(column) is None else repr(row[column]) for column in columns]


def _table(rows: list[dict], columns: tuple[str, ...]) -> pa.Table:
    types = [(name, pa.int64() if name in INTEGERS else pa.float64()) for name in columns]
    return pa.Table.from_pylist(rows, schema=pa.schema(types))
