"""Runs a packing plan to its end: resume, parts for several machines, progress, the closing table."""

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, TextIO

import PIL
import pyarrow as pa
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipelines.dataset import read_batch, read_info
from pipelines.errors import UserError
from pipelines.files import lock, sync
from pipelines.machine import usable_cores
from tools.executors import local, on_ray
from tools.images import COPIED
from tools.shards import PLAN_FILE, Job, Load, Packing, Plan, Result, finish, is_done, jobs_of

UNFINISHED = (".*.tmp-*",)  # the temporary files of writers that were killed
UNLOCKED = "another process that packs into this folder would not be noticed, so make sure there is none"
NOTES = ("[0-9]*.parquet", PLAN_FILE)  # what only an unfinished dataset needs: its shards' rows, its plan


@dataclass(frozen=True)
class Spread:
    """How packing runs: over what the shards are spread, and what becomes of files that cannot be read."""

    executor: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: a Ray cluster, all of whose nodes see source and out."""
    ray: str = "auto"
    """HOST:PORT of the cluster's head; auto: the cluster that this machine belongs to."""
    shard_range: str = ""
    """i/n: pack the i-th of n parts only, beside other processes; a run without it, at last, finishes."""
    reject_unreadable: bool = False
    """reject files that the storage fails to deliver (input/output error, stale file handle, timeout);
    otherwise their shards are left to the next run."""


Flags = Annotated[Spread, tyro.conf.arg(name="")]
HERE = Spread()


@dataclass(frozen=True)
class Crew:
    """Who packs, and which of the shards: all, or `part` (i, n), every n-th from the i-th."""

    pack: Callable[[Sequence[Job]], Iterator[Result]]
    part: tuple[int, int] | None = None
    reject_unreadable: bool = False


def settings(
    short_side: int, shard_size: int, max_pixels: int, val_fraction: float, max_reject: float
) -> Packing:
    """Check the numbers of the command line. Raises `UserError`."""
    for name, value in (("short-side", short_side), ("shard-size", shard_size), ("max-pixels", max_pixels)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}.")
    if not 0 <= max_reject <= 1:
        raise UserError(f"--max-reject must be a share from 0 to 1, not {max_reject}.")
    return Packing(short_side, shard_size, max_pixels, val_fraction, PIL.__version__)


def crew_of(workers: int | None, spread: Spread) -> Crew:
    """Who is to pack, as the command line says. Raises `UserError`."""
    processes = worker_count(workers)
    part = None
    if spread.shard_range:
        named = re.fullmatch(r"(\d{1,9})/(\d{1,9})", spread.shard_range, re.ASCII)
        part = (int(named[1]), int(named[2])) if named else (0, 0)
        if not 1 <= part[0] <= part[1]:
            raise UserError(f"--shard-range must be i/n with i from 1 to n, not {spread.shard_range}.")
    if spread.executor == "ray":
        if find_spec("ray") is None:
            raise UserError("--executor ray needs Ray, which is not installed; run make env-ray.")
        return Crew(partial(on_ray, address=spread.ray, at_once=workers), part, spread.reject_unreadable)
    if spread.ray != HERE.ray:
        raise UserError(
            f"--ray {spread.ray} is for --executor ray (EXECUTOR=ray); add that, or leave it out."
        )
    return Crew(partial(local, workers=processes), part, spread.reject_unreadable)


def worker_count(asked: int | None) -> int:
    """The processes to use: as asked, else one a core this process may run on. Raises `UserError`."""
    if asked is not None and asked < 1:
        raise UserError(f"--workers must be at least 1, not {asked}.")
    return asked or usable_cores()


def source_folder(path: Path, flag: str, what: str) -> Path:
    """`path` if it is a folder that can be listed. Raises `UserError`."""
    if not path.is_dir():
        raise UserError(f"{flag} {path} is not a folder; give the folder that holds {what}.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be read; check its permissions.")
    return path


def walk(top: Path) -> Iterator[Path]:
    """Every file below `top` that is not hidden, links followed. Raises `UserError` for a closed folder."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error

    for folder, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        here = Path(folder)
        if any(here.samefile(parent) for parent in here.parents if parent.is_relative_to(top)):
            folders.clear()  # a link back to a folder above would never end
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (here / name for name in files if not name.startswith("."))


def label_of(classes: Sequence[str], val_classes: Sequence[str], where: str) -> dict[str, int]:
    """The label of each training class; a class seen only in validation could never be learned."""
    if strange := sorted(set(val_classes) - set(classes)):
        raise UserError(f"{where}: validation has class {strange[0]!r}, which training has not.")
    return {name: label for label, name in enumerate(classes)}


def run(plan: Plan, root: Path, out: Path, load: Load, crew: Crew, max_reject: float) -> int:
    """Pack what is not packed yet, print the closing table; return the exit code.

    It is 1 when too many were rejected, or some could not be read.
    """
    console = Console(markup=False, highlight=False, emoji=False)
    with writing_to(out):
        if not (out / "dataset.json").exists():
            with _begun(plan, out, crew.part is None):
                jobs = jobs_of(plan, root, out, load, crew.reject_unreadable)
                i, n = crew.part or (1, 1)
                if unreadable := _pack_missing(jobs[i - 1 :: n], crew):
                    console.print(unreadable, soft_wrap=True)
                    return 1
                if crew.part:
                    words = (
                        f"part {i} of {n} of {out} is packed; when all are, run this without --shard-range."
                    )
                    console.print(words, soft_wrap=True)
                    return 0
                remove(out, plan.splits, *UNFINISHED)  # of nodes that died
                finish(plan, out)
        elif _agree(plan, out / "dataset.json", (out / "dataset.json").read_text(encoding="utf-8")):
            read_info(out)  # raises UserError for a dataset of an earlier format
            console.print(f"{out} is already packed with these settings.", soft_wrap=True)
        remove(out, plan.splits, *NOTES)
    return _report(console, out, plan.splits, max_reject)


def remove(out: Path, splits: Iterable[str], *patterns: str) -> None:
    """Remove such files from the folder of a dataset and those of its splits."""
    for folder in (out, *(out / split for split in splits)):
        for leftover in chain(*map(folder.glob, patterns)):
            leftover.unlink(missing_ok=True)


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Turn a failure to write below `out` into one sentence that says what to do."""
    try:
        yield
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory or by a file that crashes its decoder; "
            "run the same command again with fewer --workers, finished shards are kept."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full below {out}; free some space and run the same command again, "
                "finished shards are kept."
            ) from error
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}.") from error


@contextmanager
def _begun(plan: Plan, out: Path, alone: bool) -> Iterator[None]:
    """Note the plan in a new folder, or check that it was begun with the same plan; keep others out of it.

    Those that pack a part, who are not `alone`, keep out only those who are.
    """
    out.mkdir(parents=True, exist_ok=True)
    note = out / PLAN_FILE
    if any(out.iterdir()) and not note.exists():  # looked for last: another part may be making it
        raise UserError(f"--out {out} holds other files; give a new or an empty folder.")
    with note.open("a+") as file:  # NFS locks only what is open for writing
        _lock(file, alone)
        if os.fstat(file.fileno()).st_size == 0:
            file.write(json.dumps({"packing": plan.settings()}))
            file.flush()
            sync(note)
            _lock(file, alone)  # a part no longer needs it to itself
        file.seek(0)  # some file systems let only this open file read what it has locked
        _agree(plan, note, file.read())
        if alone:
            remove(out, plan.splits, *UNFINISHED)
        yield


def _lock(file: TextIO, alone: bool) -> None:
    """Lock the note of the plan: to itself `alone` or while it is empty, else shared. Raises `UserError`."""
    for _ in range(1 if alone else 50):  # another part holds it only while it writes
        shared = not alone and os.fstat(file.fileno()).st_size > 0
        try:
            return lock(file, Path(file.name).parent, UNLOCKED, shared=shared)
        except BlockingIOError:
            time.sleep(0.1)
    raise UserError(f"another process is packing into {Path(file.name).parent}; wait for it or stop it.")


def _agree(plan: Plan, noted: Path, text: str) -> bool:
    """Whether the `text` of `noted` describes this plan. Raises `UserError` naming the first difference."""
    try:
        # Without locks two parts may both have written the note: the first one counts.
        then = json.JSONDecoder().raw_decode(text)[0]["packing"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{noted} is damaged; delete {noted.parent} and pack again.") from error
    settings = plan.settings()
    if "fps" in settings:
        then = {"fps": 30.0, **then}  # folders of frames were packed without recording their rate
    for name, now in settings.items():
        if now == then.get(name) or (name in ("pillow", "av") and noted.name == "dataset.json"):
            continue  # a finished dataset stays good whatever version made it
        what = f"{name.replace('_', '-')} {then.get(name)}, not {now}"
        if name == "source_sha256":
            what = "another listing of source files"
        elif "max_seconds" in settings and "max_seconds" not in then:
            what = "clips from frames, not from videos"
        raise UserError(
            f"{noted.parent} was packed with {what}; give another --out (with make shards: OUT=FOLDER), "
            "or delete that folder."
        )
    return True


def _pack_missing(jobs: Sequence[Job], crew: Crew) -> str:
    """Run every job that is not done, showing progress by samples.

    Returns a message about the samples that could not be read, "" when there are none.
    """
    missing = [job for job in jobs if not is_done(job)]
    for folder in {job.folder for job in missing}:
        folder.mkdir(exist_ok=True)
    columns = TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = sum(len(job.samples) for job in jobs)
        done = total - sum(len(job.samples) for job in missing)
        bar = progress.add_task("", total=total, completed=done, note="samples, 0 rejected")
        rejected = unreadable = 0
        example = ""
        for result in crew.pack(missing):
            rejected, unreadable = rejected + result.rejected, unreadable + result.unreadable
            example = example or result.example
            note = f"samples, {rejected} rejected" + (f", {unreadable} unreadable" if unreadable else "")
            progress.update(bar, advance=result.packed + result.rejected, note=note)
    if not unreadable:
        return ""
    return (
        f"{unreadable} sample{'s' * (unreadable > 1)} could not be read, such as {example}, so their shards "
        "are not packed; run the same command again to retry them, or add --reject-unreadable to leave "
        "them out."
    )


def _report(console: Console, out: Path, splits: Iterable[str], max_reject: float) -> int:
    """Print what was packed, changed and rejected, and why; return the exit code."""
    table = Table("split", "what", "samples", "example", title=str(out))
    total = rejected = 0
    for split in splits:
        for row in _outcomes(out / f"{split}.arrow"):
            count, change, example = row["source_count"], row["change"], row["source_min"]
            total += count
            if row["status"] == "ok":
                table.add_row(split, change, str(count), "" if change == COPIED else example)
            else:
                rejected += count
                table.add_row(split, f"rejected: {row['reason']}", str(count), example, style="red")
    console.print(table)
    if rejected <= max_reject * total:
        return 0
    console.print(
        f"{rejected} of {total} samples were rejected, more than --max-reject {max_reject:.2%} allows; the "
        f"rest is packed in {out}. To take them in, put the files right, delete that folder and pack again.",
        soft_wrap=True,
    )
    return 1


def _outcomes(catalogue: Path) -> list[dict]:
    """The kinds of rows, how many and one such source: packed before rejected, most frequent first."""
    columns = ["status", "change", "reason"]
    rows = pa.Table.from_batches([read_batch(catalogue, [*columns, "source"])])
    kinds = rows.group_by(columns).aggregate([("source", "count"), ("source", "min")])
    order = [("status", "ascending"), ("source_count", "descending"), ("change", "ascending")]
    return kinds.sort_by([*order, ("reason", "ascending")]).to_pylist()
