"""Runs a packing plan to its end: resume, worker processes, progress, the closing table."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import PIL
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipelines.errors import UserError
from pipelines.files import atomic_write
from tools.images import COPIED
from tools.shards import (
    PLAN_FILE,
    Job,
    Load,
    Packing,
    Plan,
    finish,
    is_done,
    jobs_of,
    pack_shard,
    remove_unfinished,
    tidy,
)


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


def worker_count(asked: int | None) -> int:
    """The processes to use: as asked, else one a core this process may run on. Raises `UserError`."""
    if asked is not None and asked < 1:
        raise UserError(f"--workers must be at least 1, not {asked}.")
    return asked or len(os.sched_getaffinity(0))


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


def run(plan: Plan, root: Path, out: Path, load: Load, workers: int, max_reject: float) -> int:
    """Pack what is not packed yet, print the closing table; return the exit code (1: too many rejected)."""
    console = Console(markup=False, highlight=False, emoji=False)
    with writing_to(out):
        if not (out / "dataset.json").exists():
            with _begun(plan, out):
                _pack_missing(jobs_of(plan, root, out, load), workers)
                finish(plan, out)
        elif _agree(plan, out / "dataset.json"):
            console.print(f"{out} is already packed with these settings.", soft_wrap=True)
        tidy(out, list(plan.splits))
    return _report(console, out, list(plan.splits), max_reject)


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
def _begun(plan: Plan, out: Path) -> Iterator[None]:
    """Note the plan in a new folder, or check that it was begun with the same plan; keep others out of it."""
    if not (out / PLAN_FILE).exists():
        out.mkdir(parents=True, exist_ok=True)
        if any(entry for entry in out.iterdir() if not entry.name.startswith(f".{PLAN_FILE}.tmp-")):
            raise UserError(f"--out {out} holds other files; give a new or an empty folder.")
        with atomic_write(out / PLAN_FILE) as path:
            path.write_text(json.dumps({"packing": plan.settings()}))
    _agree(plan, out / PLAN_FILE)
    with (out / PLAN_FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing into {out}; wait for it or stop it.") from error
        remove_unfinished(out, list(plan.splits))
        yield


def _agree(plan: Plan, noted: Path) -> bool:
    """Whether `noted` describes this plan. Raises `UserError` naming the first setting that differs."""
    try:
        then = json.loads(noted.read_text())["packing"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{noted} is damaged; delete {noted.parent} and pack again.") from error
    for name, now in plan.settings().items():
        if now == then.get(name) or (name in ("pillow", "av") and noted.name == "dataset.json"):
            continue  # a finished dataset stays good whatever version made it
        what = f"{name.replace('_', '-')} {then.get(name)}, not {now}"
        if name == "source_sha256":
            what = "another listing of source files"
        raise UserError(f"{noted.parent} was packed with {what}; delete that folder or give another --out.")
    return True


def _pack_missing(jobs: Sequence[Job], workers: int) -> None:
    """Run every job that is not done, showing progress by samples."""
    missing = [job for job in jobs if not is_done(job)]
    for folder in {job.folder for job in missing}:
        folder.mkdir(exist_ok=True)
    columns = TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = sum(len(job.samples) for job in jobs)
        done = total - sum(len(job.samples) for job in missing)
        bar = progress.add_task("", total=total, completed=done, note="samples, 0 rejected")
        rejected = 0
        for samples, bad in _run(missing, workers):
            rejected += bad
            progress.update(bar, advance=samples + bad, note=f"samples, {rejected} rejected")


def _run(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, int]]:
    """Give each job's result as it ends, in this process or in `workers` fresh ones."""
    if workers == 1 or len(jobs) < 2:
        yield from map(pack_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _follow_parent)
    try:
        for future in as_completed([pool.submit(pack_shard, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Worker start: die on Ctrl-C without a traceback, and with the parent, even one killed outright."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _report(console: Console, out: Path, splits: Sequence[str], max_reject: float) -> int:
    """Print what was packed, changed and rejected, and why; return the exit code."""
    table = Table("split", "what", "samples", "example", title=str(out))
    total = rejected = 0
    for split in splits:
        for status, change, reason, count, example in _outcomes(out / f"{split}.parquet"):
            total += count
            if status == "ok":
                table.add_row(split, change, str(count), "" if change == COPIED else example)
            else:
                rejected += count
                table.add_row(split, f"rejected: {reason}", str(count), example, style="red")
    console.print(table)
    if rejected <= max_reject * total:
        return 0
    console.print(
        f"{rejected} of {total} samples were rejected, more than --max-reject {max_reject:.2%} allows; the "
        f"rest is packed in {out}. To take them in, put the files right, delete that folder and pack again.",
        soft_wrap=True,
    )
    return 1


def _outcomes(catalogue: Path) -> list[tuple[str, str, str, int, str]]:
    """(status, change, reason, samples, one such source), packed before rejected, most frequent first."""
    columns = ["status", "change", "reason"]
    rows = pq.read_table(catalogue, columns=[*columns, "source"])
    groups = rows.group_by(columns).aggregate([("source", "count"), ("source", "min")]).to_pylist()
    groups.sort(key=lambda group: (group["status"], -group["source_count"], group["change"], group["reason"]))
    return [
        (*(group[name] for name in columns), group["source_count"], group["source_min"]) for group in groups
    ]
