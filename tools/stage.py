"""Copies a packed dataset to a machine's own disk: python -m tools.stage s3://bucket/imagenet /local/imagenet

The source is a folder, or a URI of any store that Arrow reads: s3://, gs://, hdfs://. An S3-compatible store
is named as s3://bucket/imagenet?endpoint_override=host:port&scheme=https, its keys come from the environment
as for other S3 clients. Every sample is held against its checksum on arrival. Files that are there already
stay, so running it again after an interruption goes on; dataset.json comes last and makes the copy whole.
"""

import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import tyro
from pyarrow import fs
from rich.console import Console
from rich.progress import track

from pipelines.dataset import missing_shards, open_split, read_info
from pipelines.errors import UserError, first_line, run_cli
from pipelines.files import atomic_write, lock, sha256_of
from tools.shards import Row
from tools.verify import Tally, rows_by_shard

ATTEMPTS = 4
UNLOCKED = "two stage commands would disturb each other, so run one stage command at a time"
BLOCK = 4 << 20  # bytes


def stage(source: tyro.conf.Positional[str], target: tyro.conf.Positional[Path], /, workers: int = 8) -> None:
    """Copy the dataset at `source` to the folder `target`; raises UserError when it cannot be completed.

    Args:
        source: folder or URI of a dataset that tools.pack_* wrote.
        target: folder on a local disk.
        workers: files under way at once.
    """
    store, top = open_store(source)
    if store.get_file_info(f"{top}/dataset.json").type != fs.FileType.File:
        raise UserError(f"{top}/dataset.json does not exist; a packed dataset has one at its top")
    target.mkdir(parents=True, exist_ok=True)
    folder = os.open(target, os.O_RDONLY)
    try:
        lock(folder, target, UNLOCKED, wait=True)  # where every process of a machine calls this, one copies
        copy_dataset(store, top, target, workers)
    finally:
        os.close(folder)


def copy_dataset(store: fs.FileSystem, top: str, target: Path, workers: int) -> None:
    """`stage`, with the target to itself."""
    whole, waiting = target / "dataset.json", target / ".staging"
    waiting.mkdir(exist_ok=True)
    fetch(store, f"{top}/dataset.json", waiting / "dataset.json")
    if whole.is_file() and whole.read_bytes() != (waiting / "dataset.json").read_bytes():
        raise UserError(f"{target} holds another dataset than {top}; choose an empty folder.")
    info = replace(read_info(waiting), root=target)
    start, came, kept = time.perf_counter(), 0, 0
    for split, lengths in info.tar_bytes.items():
        (target / split).mkdir(exist_ok=True)
        catalogue, checksum = info.catalogue(split), info.catalogue_sha256[split]
        if not catalogue.is_file() or sha256_of(catalogue) != checksum:
            came += fetch(store, f"{top}/{split}.arrow", catalogue, checksum)
        open_split(info, split)  # raises UserError for a catalogue that cannot be used
        missing = {*missing_shards(info, split)}
        kept += len(lengths) - len(missing)
        check_space(target, split, sum(lengths[shard] for shard in missing))
        listed = enumerate(rows_by_shard(catalogue, len(lengths), Tally()))
        jobs = (
            partial(fetch_shard, store, f"{top}/{split}/{shard:06d}", target / split / f"{shard:06d}", rows)
            for shard, rows in listed
            if shard in missing
        )
        progress = track(
            in_parallel(jobs, workers), split, len(missing), transient=True, console=Console(stderr=True)
        )
        came += sum(progress)
        for leftover in (target / split).glob(".*.tmp-*"):  # of a copy that was killed
            leftover.unlink()
    (waiting / "dataset.json").replace(whole)
    shutil.rmtree(waiting)
    seconds = time.perf_counter() - start
    speed = f"{came / 1e6:.0f} MB came in {seconds:.1f} s ({came / 1e6 / seconds:.0f} MB/s)"
    print(f"{target}: {speed}, checked; {kept} shards were there already")


def open_store(source: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder or URI, and the path in it. Raises UserError for what Arrow cannot read."""
    try:
        store, top = fs.FileSystem.from_uri(source if "://" in source else str(Path(source).absolute()))
        return store, top.rstrip("/")
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{source} cannot be opened: {first_line(error)}") from error


def fetch(
    store: fs.FileSystem, source: str, target: Path, checksum: str = "", rows: Sequence[Row] = ()
) -> int:
    """Copy one file and give its size in bytes.

    The copy must have the sha256 `checksum`, if there is one, and a tar's samples the checksums in `rows`. A
    failure is tried again with growing pauses; then UserError.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            with atomic_write(target) as temporary:
                with open_source(store, source) as reader, temporary.open("wb") as writer:
                    while block := reader.read(BLOCK):
                        writer.write(block)
                if checksum and sha256_of(temporary) != checksum:
                    raise OSError("it does not have its checksum in dataset.json: is the source damaged?")
                if damaged := damaged_sample(temporary, rows):
                    raise OSError(f"sample {damaged} does not have its checksum: is the source damaged?")
                return temporary.stat().st_size
        except (OSError, pa.ArrowException) as error:
            reason = first_line(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(0.5 * 2**attempt)
    raise UserError(f"{source} could not be copied to {target} ({reason}); run it again to go on")


def open_source(store: fs.FileSystem, source: str) -> pa.NativeFile:
    """Open a file of the source. Raises UserError when it does not exist."""
    try:
        return store.open_input_stream(source)
    except FileNotFoundError as error:
        raise UserError(f"{source} does not exist; pack or copy the source again") from error


def damaged_sample(tar: Path, rows: Sequence[Row]) -> str | None:
    """The key of the first sample whose frames are not those of the catalogue."""
    with tar.open("rb") as file:  # not every file system can map files into memory
        for row in rows:
            digest = hashlib.sha256()
            for offset, size in zip(row["offsets"], row["sizes"], strict=True):
                digest.update(os.pread(file.fileno(), size, offset))
            if digest.hexdigest() != row["sha256"]:
                return row["key"]
    return None


def fetch_shard(store: fs.FileSystem, source: str, target: Path, rows: list[Row]) -> int:
    """Copy a shard's index, then its tar, whose presence says that both are there; gives bytes."""
    index = fetch(store, f"{source}.idx", target.with_suffix(".idx"))
    return index + fetch(store, f"{source}.tar", target.with_suffix(".tar"), rows=rows)


def in_parallel(jobs: Iterable[Callable[[], int]], workers: int) -> Iterator[int]:
    """The sizes that came, with a few jobs ahead of the one waited for, so that memory stays small."""
    under_way: deque[Future[int]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for job in jobs:
            under_way.append(pool.submit(job))
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def check_space(target: Path, split: str, needed: int) -> None:
    """Raise UserError when the `needed` bytes cannot fit on the target's disk."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"{target} has {free / 1e9:.1f} GB free and {split} needs {needed / 1e9:.1f} GB more; "
            "free some space or choose another disk"
        )


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(stage, description=__doc__))
