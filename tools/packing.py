"""Pack the shards of a plan: options, resume, parts for several machines, progress, the summary table."""

import errno
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipelines.dataset import read_batch, read_info
from pipelines.errors import UserError, check_local
from pipelines.machine import usable_cores
from tools.estimate import announce
from tools.executors import local, on_ray, prepare
from tools.images import COPIED
from tools.planfile import UNFINISHED, begin, check_same, remove
from tools.shards import PLAN_FILE, Job, Load, PackPlan, Result, finish, is_done, jobs_of, readable

LEFT_OUT = 12  # most kinds of other files in the summary table
REASONS = 20  # most reasons of rejection of a split in it
REJECTED = 20  # most rejected samples below it
NOTES = ("[0-9]*.parquet", PLAN_FILE)  # an unfinished dataset's rows per shard and its plan


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of all packing commands. Raises UserError for a value out of its range."""

    workers: int | None = None
    """processes, by default one per core; with Ray: shards that are packed at the same time"""
    short_side: int = 256
    """larger pictures and frames are scaled down until their shorter side has this many pixels, and encoded
    as JPEGs of quality 90; correct JPEGs that are not larger are copied byte for byte. To keep the originals,
    give a side that no picture exceeds, such as 100000"""
    max_pixels: int = 100_000_000
    """larger pictures and frames are rejected"""
    max_reject: float = 0.01
    """if a larger share of the samples is rejected, or a tar is damaged, the exit code is 1; a share of 1
    accepts both"""
    executor: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: a Ray cluster, all of whose nodes see source and out"""
    ray: str = "auto"
    """HOST:PORT of the cluster's head; auto: the cluster that this machine belongs to"""
    shard_range: str = ""
    """i/n: pack every n-th shard, starting with the i-th; several commands may run at the same time. When all
    have ended, the command without --shard-range completes the dataset"""
    reject_unreadable: bool = False
    """reject files that the storage fails to deliver (input/output error, stale file handle, timeout);
    otherwise their shards are packed when the command runs again"""
    ignore_free_space: bool = False
    """pack even if the disk seems too small, as on a file system that compresses"""
    val_fraction: float = 0.1
    """share of each class (of tars: of all samples) that becomes the validation split, if there is none"""

    def __post_init__(self) -> None:
        for name in ("workers", "short_side", "shard_size", "max_pixels"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        for name in ("fps", "source_fps"):
            if (value := getattr(self, name, None)) is not None and not 0 < value <= 1000:
                raise UserError(
                    f"--{name.replace('_', '-')} is {value:g}; it must be above 0 and at most 1000."
                )
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}; it must be at least 0 and below 1.")
        if not 0 <= self.max_reject <= 1:
            raise UserError(f"--max-reject is {self.max_reject}; it must be a share from 0 to 1.")
        if self.part and not 1 <= self.part[0] <= self.part[1]:
            raise UserError(f"--shard-range is {self.shard_range}; it must be i/n with i from 1 to n.")
        if self.executor == "ray" and find_spec("ray") is None:
            raise UserError("--executor ray needs Ray, which is not installed; run make env-ray.")
        if self.executor != "ray" and self.ray != "auto":
            raise UserError(f"--ray {self.ray} needs --executor ray (EXECUTOR=ray); add it, or omit --ray.")

    @property
    def part(self) -> tuple[int, int] | None:
        """(i, n) of --shard-range, (0, 0) if it is malformed; None for all shards."""
        named = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard_range, re.ASCII)
        return (int(named[1]), int(named[2])) if named else (0, 0) if self.shard_range else None

    @property
    def processes(self) -> int:
        """Processes of this machine: --workers, by default one per core that this process may use."""
        return self.workers or usable_cores()

    def pack(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Pack the jobs; yield each shard's result when it ends, in any order."""
        if self.executor == "ray":
            return on_ray(jobs, self.ray, self.workers)
        return local(jobs, self.processes)


def source_folder(path: Path, flag: str, what: str) -> Path:
    """`path`, if it is a folder that can be listed. Raises `UserError`."""
    if not path.is_dir():
        raise UserError(f"{flag} {path} is not a folder; give the folder that holds {what}.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be read; check its permissions.")
    return path


def run(plan: PackPlan, root: Path, out: Path, load: Load, options: PackOptions) -> int:
    """Pack what is not packed yet and print the summary table; return the exit code.

    The exit code is 1 if too many samples were rejected or some could not be read.
    """
    check_local(out, "--out")
    console = Console(markup=False, highlight=False, emoji=False)
    with writing_to(out):
        if not (out / "dataset.json").exists():
            jobs = jobs_of(plan, root, out, load, options.reject_unreadable)
            if options.executor == "local":
                prepare(jobs, options.processes)  # its imports and the estimate run at the same time
            estimate = partial(
                announce, jobs, options.part or (1, 1), out, options.processes, options.ignore_free_space
            )
            if fresh := not (out / PLAN_FILE).exists():  # if it does not fit, no folder is made
                estimate()
            with begin(plan, out, options.part is None):
                if not fresh:
                    estimate()
                if (code := pack_part(jobs, options, out, console)) is not None:
                    return code
                remove(out, plan.splits, *UNFINISHED)  # of machines that died
                finish(plan, out)
        else:
            check_same(plan, out / "dataset.json", out)
            read_info(out)  # raises UserError for a dataset of an earlier format
            console.print(
                f"{out} is already packed with these settings. The contents of the source files are not "
                "compared: if they have changed, give another --out (with make shards: OUT=FOLDER), or "
                "delete that folder.",
                soft_wrap=True,
            )
        remove(out, plan.splits, *NOTES)
    return report(console, out, plan, options.max_reject)


def pack_part(
    jobs: Sequence[Job], options: PackOptions, out: Path, console: Console, unit: str = "samples"
) -> int | None:
    """Pack the jobs of --shard-range; return the exit code, None if all jobs are done and none has failed.

    unit: what the sources are called.
    """
    i, n = options.part or (1, 1)
    mine = jobs[i - 1 :: n]
    if kept := sum(map(is_done, mine)):
        line = f"{kept} of {len(mine)} shards exist already and are kept; the contents of their source files"
        console.print(f"{line} are not compared", soft_wrap=True)
    if unreadable := _pack_missing(mine, options, unit):
        console.print(unreadable, soft_wrap=True)
        return 1
    if options.part:
        rest = "when all parts are done, run this without --shard-range."
        console.print(f"part {i} of {n} of {out} is done; {rest}", soft_wrap=True)
        return 0
    return None


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Raise `UserError` if writing below `out` fails or a worker process dies."""
    try:
        yield
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory or by a file that crashes its decoder; "
            "run the same command again with fewer --workers; finished shards are kept."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full below {out}; free some space and run the same command again; "
                "finished shards are kept."
            ) from error
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}; check --out.") from error


def _pack_missing(jobs: Sequence[Job], options: PackOptions, unit: str) -> str:
    """Run every job that is not done, with a progress bar in sources, named `unit`.

    Returns a message about samples that could not be read, "" if there are none.
    """
    missing = [job for job in jobs if not is_done(job)]
    for folder in {job.folder for job in missing}:
        folder.mkdir(exist_ok=True)
    columns = TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = sum(len(job.samples) for job in jobs)
        done = total - sum(len(job.samples) for job in missing)
        bar = progress.add_task("", total=total, completed=done, note=f"{unit}, 0 rejected")
        rejected = unreadable = 0
        example = ""
        for result in options.pack(missing):
            rejected, unreadable = rejected + result.rejected, unreadable + result.unreadable
            example = example or result.example
            note = f"{unit}, {rejected} rejected" + (f", {unreadable} unreadable" if unreadable else "")
            progress.update(bar, advance=result.sources, note=note)
    if not unreadable:
        return ""
    return (
        f"{unreadable} sample{'s' * (unreadable > 1)} could not be read, such as {example}, so their shards "
        "are not packed; run the same command again to retry them, or add --reject-unreadable to omit them."
    )


def report(console: Console, out: Path, plan: PackPlan, max_reject: float) -> int:
    """Print a table of classes, samples by what happened to them, and other files; return the exit code."""
    table = Table("split", "what", "samples", "example", title=str(out))
    names = ", ".join([*plan.classes[:3], *["..."] * (len(plan.classes) > 3)])
    table.add_row("", "classes", str(len(plan.classes)), names or "the samples have no classes")
    total = rejected = 0
    columns = ["status", "change", "reason", "source"]
    parts = {split: read_batch(out / f"{split}.arrow", columns) for split in plan.splits}
    for split, rows in parts.items():
        for row in _outcomes(rows):
            count, change, example = row["source_count"], row["change"], row["source_min"]
            total += count
            if row["status"] == "ok":
                table.add_row(split, change, str(count), "" if change == COPIED else example)
            else:
                rejected += count
                table.add_row(split, f"rejected: {row['reason']}", str(count), example, style="red")
    for what, (count, example) in sorted(plan.left_out.items(), key=lambda item: -item[1][0])[:LEFT_OUT]:
        table.add_row("", f"left out: {what}", str(count), readable(example))
    console.print(table)
    if rejected:
        console.print(_rejected(pa.Table.from_batches(parts.values())), soft_wrap=True)
    if rejected < total:
        console.print(next_commands(out), soft_wrap=True)
    if rejected <= max_reject * total:
        return 0
    enough = math.ceil(1000 * rejected / total) / 1000
    console.print(
        f"{rejected} of {total} samples were rejected, more than --max-reject {max_reject:.2%} allows; the "
        f"rest is packed in {out}. To accept that, add --max-reject {enough} (with make: in ARGS=). To "
        "include them, repair the files and pack into another folder.",
        soft_wrap=True,
    )
    return 1


def _rejected(rows: pa.Table) -> str:
    """The rejected samples by name, with their reasons, a line each; after the first REJECTED a count."""
    rows = rows.filter(pc.field("status") == "rejected").sort_by("source")
    lines = [f"  {row['source']}: {row['reason']}" for row in rows[:REJECTED].to_pylist()]
    if (more := len(rows) - REJECTED) > 0:
        lines.append(
            f"  and {more} more; docs/data.md has a command that lists all (What happens to damaged files?)"
        )
    return "\n".join(["the rejected samples:", *lines])


def next_commands(out: Path) -> str:
    """The commands that train on the packed dataset `out`: pretraining, and with classes finetuning."""
    info = read_info(out)
    data = f"DATA={shlex.quote(str(out).replace('$', '$$'))}"  # make reads $ as a variable
    pretrained = f"{info.kind}-mae-base"
    lines = [f"to pretrain: make train-mae RECIPE={pretrained} {data}"]
    if len(info.classes) > 1:
        init = f"INIT=runs/{pretrained}"
        lines.append(f"to finetune: make train-ft RECIPE={info.kind}-ft-base {data} {init}")
    pico = "without a GPU: choose pico instead of base, and add DEVICE=cpu"
    return "\n".join([*lines, f"{pico}; docs/which.md lists recipes and published weights"])


def _outcomes(rows: pa.RecordBatch) -> list[dict]:
    """Row counts by (status, change, reason), with one source each: packed first, then the most frequent.

    The reasons after the first REASONS become one row.
    """
    table = pa.Table.from_batches([rows])
    kinds = table.group_by(["status", "change", "reason"]).aggregate([("source", "count"), ("source", "min")])
    order = [("status", "ascending"), ("source_count", "descending"), ("change", "ascending")]
    found = kinds.sort_by([*order, ("reason", "ascending")]).to_pylist()
    last = sum(row["status"] == "ok" for row in found) + REASONS
    if rest := found[last:]:
        count = sum(row["source_count"] for row in rest)
        found[last:] = [rest[0] | {"reason": "other reasons", "source_count": count}]
    return found
