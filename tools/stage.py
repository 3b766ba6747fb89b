"""Copy a packed dataset to a local disk: python -m tools.stage s3://bucket/imagenet /local/imagenet

The source is a folder, or a URI of a store that Arrow reads: s3://, gs://, hdfs://. For an S3-compatible
store, write s3://bucket/imagenet?endpoint_override=host:port&scheme=https; its keys come from the environment
as for other S3 clients. The checksum of every sample is checked. Existing files are kept, so after an
interruption the same command continues. dataset.json is written last; with it, the copy is complete.
"""

import hashlib
import json
import os
import posixpath
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import call
from pathlib import Path

import pyarrow as pa
import tyro
from pyarrow import fs
from rich.console import Console
from rich.progress import track

from pipelines.dataset import (
    SCHEMA,
    DatasetInfo,
    length_of,
    missing_shards,
    open_split,
    read_batch,
    read_info,
)
from pipelines.errors import UserError, check_local, first_line, run_cli
from pipelines.files import atomic_text, atomic_write, lock, sha256_of
from tools.verify import by_shard

ATTEMPTS = 4
UNLOCKED = "two stage commands would disturb each other, so run one stage command at a time"
BLOCK = 4 << 20  # bytes
STORES, GIVEN = ("s3://", "gs://", "hdfs://", "file://"), "s3://, gs:// or hdfs://"


def stage(source: tyro.conf.Positional[str], target: tyro.conf.Positional[Path], /, workers: int = 8) -> None:
    """Copy the dataset at `source` to the folder `target`. Raises UserError if that fails.

    Args:
        source: folder or URI of a packed dataset.
        target: folder on a local disk.
        workers: files that are copied at the same time.
    """
    check_local(target, "target")
    store, top = open_store(source)
    if not has_file(store, f"{top}/dataset.json"):
        raise UserError(f"{top}/dataset.json does not exist; give the top folder of a packed dataset")
    target.mkdir(parents=True, exist_ok=True)
    folder = os.open(target, os.O_RDONLY)
    try:
        lock(folder, target, UNLOCKED, wait=True)  # if all processes of a machine call this, one copies
        copy_dataset(store, top, target, workers)
    finally:
        os.close(folder)


def copy_dataset(store: fs.FileSystem, top: str, target: Path, workers: int) -> None:
    """`stage`, while the target is locked."""
    done, waiting = target / "dataset.json", target / ".staging"
    waiting.mkdir(exist_ok=True)
    before = noted.read_bytes() if (noted := waiting / "dataset.json").is_file() else b""
    fetch(store, f"{top}/dataset.json", noted)
    try:
        source = read_info(waiting)
    except UserError as error:
        raise UserError(str(error).replace(str(waiting), top)) from error
    info = replace(source, root=target, tars=own_places(source, noted))
    if done.is_file() and done.read_bytes() != noted.read_bytes():
        raise UserError(f"{target} contains a different dataset than {top}; choose an empty folder.")
    if before not in (b"", noted.read_bytes()):  # tars of another dataset, perhaps with the same lengths
        for tar in (tar for split in info.splits for tar in (target / split).glob("[0-9]*.tar")):
            tar.unlink()
    start, came, kept = time.perf_counter(), 0, 0
    for split in info.splits:
        lengths = info.tar_bytes[split]
        (target / split).mkdir(exist_ok=True)
        catalogue, checksum = info.catalogue(split), info.catalogue_sha256[split]
        if not catalogue.is_file() or sha256_of(catalogue) != checksum:
            came += fetch(store, f"{top}/{split}.arrow", catalogue, checksum)
        rows = by_shard(open_split(info, split), read_batch(catalogue, SCHEMA.names))
        missing = missing_shards(info, split)
        # Of a tar that another split has copied, the samples of this split are still to be checked.
        shared = {n for n, path in enumerate(info.tars.get(split, ())) if not path.startswith(f"{split}/")}
        todo = sorted({*missing} | shared)
        kept += len(lengths) - len(todo)
        check_space(target, split, sum(lengths[shard] for shard in missing))
        places = list(places_in(store, top, source, split))
        jobs = [
            partial(copy_shard, store, places[n], info.tar_path(split, n), rows[n], lengths[n], not info.tars)
            for n in todo
        ]
        pool = ThreadPoolExecutor(workers)
        try:
            sizes = pool.map(call, jobs)
            came += sum(track(sizes, split, len(jobs), transient=True, console=Console(stderr=True)))
        finally:
            pool.shutdown(cancel_futures=True)
        for leftover in (target / split).glob(".*.tmp-*"):  # of killed commands
            leftover.unlink()
    noted.replace(done)
    shutil.rmtree(waiting)
    seconds = time.perf_counter() - start
    speed = f"{came / 1e6:.0f} MB in {seconds:.1f} s ({came / 1e6 / seconds:.0f} MB/s)"
    print(f"{target}: copied {speed}, checksums correct; {kept} shards existed already")


def open_store(source: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder or URI, and the path in it. Raises UserError if Arrow cannot read it."""
    if "://" in source and not source.startswith(STORES):
        raise UserError(f"{source} cannot be opened; give a folder, or a URI that begins with {GIVEN}")
    try:
        store, top = fs.FileSystem.from_uri(source if "://" in source else str(Path(source).absolute()))
        return store, top.rstrip("/")
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"{source} cannot be opened ({first_line(error)}); give a folder, or a URI that begins with "
            f"{GIVEN}"
        ) from error


def has_file(store: fs.FileSystem, path: str) -> bool:
    """Whether the store has this file. Raises UserError if the store refuses to answer."""
    try:
        return store.get_file_info(path).type == fs.FileType.File
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); check the address and the credentials, for s3:// "
            "the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error


def fetch(
    store: fs.FileSystem, source: str, target: Path, checksum: str = "", rows: pa.RecordBatch | None = None
) -> int:
    """Copy one file; return its size in bytes.

    The copy must have the sha256 `checksum`, if given, and the samples of a tar the checksums in `rows`.
    After a failure, it is copied again with growing pauses. Raises UserError if all attempts fail.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            if (kind := store.get_file_info(source).type) != fs.FileType.File:  # a device would never end
                what = "does not exist" if kind == fs.FileType.NotFound else "is not a file"
                raise UserError(f"{source} {what}; restore it, or pack or copy the source again")
            with atomic_write(target) as temporary:
                with store.open_input_stream(source) as reader, temporary.open("wb") as writer:
                    shutil.copyfileobj(reader, writer, BLOCK)
                if checksum and sha256_of(temporary) != checksum:
                    raise OSError("its checksum is not the one in dataset.json: is the source damaged?")
                if rows and (damaged := damaged_sample(temporary, rows)):
                    raise OSError(f"the checksum of sample {damaged} differs: is the source damaged?")
                return temporary.stat().st_size
        except (OSError, pa.ArrowException) as error:
            reason = first_line(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(0.5 * 2**attempt)
    raise UserError(
        f"{source} could not be copied to {target} ({reason}); run the same command again to continue"
    )


def damaged_sample(tar: Path, rows: pa.RecordBatch) -> str:
    """The key of the first sample whose frames are not those of the catalogue; "" if there is none."""
    with tar.open("rb") as file:  # not every file system can map files into memory
        for row in rows.to_pylist():
            digest = hashlib.sha256()
            for offset, size in zip(row["offsets"], row["sizes"], strict=True):
                digest.update(os.pread(file.fileno(), size, offset))
            if digest.hexdigest() != row["sha256"]:
                return str(row["key"])
    return ""


def copy_shard(
    store: fs.FileSystem, source: str, target: Path, rows: pa.RecordBatch, length: int, with_index: bool
) -> int:
    """Copy a shard, unless its copy has this length (bytes) and its samples; return the bytes copied.

    The index comes first: if the tar exists, both are complete.
    """
    if length_of(target) == length and not damaged_sample(target, rows):
        return 0
    copied = 0
    if with_index:
        copied = fetch(store, source.removesuffix(".tar") + ".idx", target.with_suffix(".idx"))
    return copied + fetch(store, source, target, rows=rows)


# ---- tars that another program wrote ---------------------------------------------------------------------


def own_places(info: DatasetInfo, file: Path) -> dict[str, list[str]]:
    """Where the copy has the tars of others, by split; also written into the copy's dataset.json `file`."""
    if not info.tars:
        return {}
    places: dict[str, str] = {}  # two splits may share a tar
    tars = {
        split: [places.setdefault(path, f"{split}/{shard:06d}.tar") for shard, path in enumerate(paths)]
        for split, paths in info.tars.items()
    }
    raw = json.loads(file.read_bytes()) | {"tars": tars}
    atomic_text(file, json.dumps(raw, indent=1, ensure_ascii=False) + "\n")
    return tars


def places_in(store: fs.FileSystem, top: str, info: DatasetInfo, split: str) -> Iterator[str]:
    """Where the source has each tar of a split. Raises UserError for one that is outside a remote source."""
    for shard in range(info.splits[split]["shards"]):
        path = info.tars[split][shard] if info.tars else f"{split}/{shard:06d}.tar"
        if store.type_name != "local" and (path.startswith("/") or ".." in path.split("/")):
            raise UserError(f"{path} is outside {top}; copy its tars there, or stage from a local folder")
        yield posixpath.join(top, path)


def check_space(target: Path, split: str, needed: int) -> None:
    """Raise UserError if `needed` bytes do not fit on the target's disk."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"{target} has {free / 1e9:.1f} GB free and {split} needs {needed / 1e9:.1f} GB more; "
            "free some space or choose another disk"
        )


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(stage, description=__doc__), remote=True)
