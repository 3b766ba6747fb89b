"""The numbers of a catalogue as flat arrays; a large one's are memory-mapped, so that processes share them.

A catalogue of millions of frames is checked and written out once, array by array, in a hidden folder beside
its Parquet, named after the Parquet's size and time, and mapped from there: opening takes milliseconds and
the pages are the same for every process on the machine.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.files import lock, sync

LARGE = 2_000_000  # frames from which a catalogue is mapped instead of read
ROWS_AT_ONCE = 4096
PER_SAMPLE = ("shard", "label", "width", "height")
PER_FRAME = {"offset": "offsets", "size": "sizes", "crc": "crcs"}
TYPES: dict[str, type[np.number]] = {
    **dict.fromkeys(PER_SAMPLE, np.int32),
    "first_frame": np.int64,
    "offset": np.int64,
    "size": np.int32,
    "crc": np.uint32,
}
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # another process gave its folder the name first
LONGEST = 65_535  # pixels on a JPEG's side
LARGEST = 1 << 30  # pixels that a decoder takes


@dataclass(frozen=True)
class Bounds:
    """What a catalogue's numbers must keep to."""

    classes: int
    samples: int
    tar_bytes: np.ndarray  # [shards] int64, the length of each tar


def load_columns(parquet: Path, bounds: Bounds) -> dict[str, np.ndarray]:
    """The columns of the rows whose status is "ok", by the names `Dataset` gives them.

    Raises ValueError for numbers that cannot be.
    """
    with pq.ParquetFile(parquet) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        frames = sum(group.column(group.num_columns - 2).num_values for group in groups)
    if frames < LARGE:
        parts = list(readable(parquet, bounds))
        return {name: np.concatenate([part[name] for part in parts]) for name in TYPES}
    stat = parquet.stat()
    stamp = f"{stat.st_size:x}-{stat.st_mtime_ns:x}-{bounds.classes}"
    beside = parquet.with_name(f".{parquet.stem}.{stamp}.columns")
    elsewhere = (
        Path(tempfile.gettempdir()) / f"hiera-train-{os.getuid()}" / f"{stat.st_ino:x}-{stamp}.columns"
    )
    for folder in (beside, elsewhere):  # the second where the data lies on a read-only disk
        try:
            folder.parent.mkdir(exist_ok=True, mode=0o700)
            if folder is elsewhere and folder.parent.lstat().st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "it belongs to somebody else")
            return mapped(folder, parquet, bounds)
        except OSError as error:
            if error.errno is None:  # of the Parquet, not of the folder
                raise
            reason = error
    raise UserError(
        f"{beside.parent} and {elsewhere.parent} cannot be written to ({reason}); free some space, or set "
        "TMPDIR to a folder that can be written to"
    )


def mapped(folder: Path, parquet: Path, bounds: Bounds) -> dict[str, np.ndarray]:
    """The columns mapped from `folder`, which the first process to come here makes."""
    if not folder.is_dir():
        with (folder.parent / f".{parquet.stem}.lock").open("w") as held:
            # Without locks each process writes a copy, and the first one counts.
            lock(held, folder.parent, risk="", wait=True)
            if not folder.is_dir():
                make_folder(folder, parquet, bounds)
    with suppress(FileNotFoundError, ValueError):
        columns = {name: np.asarray(np.memmap(folder / name, kind, "r")) for name, kind in TYPES.items()}
        samples, frames = len(columns["shard"]), int(columns["first_frame"][-1])
        lengths = dict.fromkeys(PER_SAMPLE, samples) | dict.fromkeys(PER_FRAME, frames)
        lengths["first_frame"] = samples + 1
        if all(len(columns[name]) == length for name, length in lengths.items()):
            return columns
    raise UserError(f"{folder} is damaged; delete it, and it will be made anew")


def make_folder(folder: Path, parquet: Path, bounds: Bounds) -> None:
    """Write the columns out; the folder gets its name last, and those of earlier versions go."""
    temporary = Path(tempfile.mkdtemp(prefix=".columns-", dir=folder.parent))
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context((temporary / name).open("wb")) for name in TYPES}
            for part in readable(parquet, bounds):
                for name, values in part.items():
                    files[name].write(values.data)
        for name in TYPES:  # a folder that has its name must hold its data, also after a power cut
            sync(temporary / name)
        temporary.replace(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (isinstance(error, OSError) and error.errno in TAKEN and folder.is_dir()):
            raise
    for old in folder.parent.glob(f".{parquet.stem}.*.columns"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def readable(parquet: Path, bounds: Bounds) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the rows whose status is "ok", in order, a few thousand rows at a time."""
    total = samples = shard = 0
    yield {name: np.zeros(int(name == "first_frame"), kind) for name, kind in TYPES.items()}
    names = ["status", *PER_SAMPLE, "frames", *PER_FRAME.values()]
    # Buffering takes three times the memory.
    with pq.ParquetFile(parquet, pre_buffer=False, page_checksum_verification=True) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
            rows = batch.filter(pc.equal(batch["status"], "ok"))  # pyrefly: ignore
            part = {name: rows[name].to_numpy() for name in PER_SAMPLE}
            lists = {name: rows[column] for name, column in PER_FRAME.items()}
            part |= {name: values.flatten().to_numpy() for name, values in lists.items()}
            counts = rows["frames"].to_numpy()
            if any((values.value_lengths().to_numpy() != counts).any() for values in lists.values()):
                raise ValueError("its lists are not as long as its frames are many")
            check_part(part, counts, shard, bounds)
            part["first_frame"] = total + np.cumsum(counts, dtype=np.int64)
            total, samples = total + len(part["size"]), samples + len(counts)
            shard = part["shard"][-1] if len(counts) else shard
            yield part
    if samples != bounds.samples:
        raise ValueError(f"it has {samples} samples, dataset.json says {bounds.samples}")


def check_part(part: dict[str, np.ndarray], counts: np.ndarray, shard: int, bounds: Bounds) -> None:
    """Raise ValueError for numbers that cannot be; the last shard before was `shard`."""
    shards, offsets, sizes = part["shard"], part["offset"], part["size"]
    if (shards < np.append(shard, shards[:-1])).any() or (shards >= len(bounds.tar_bytes)).any():
        raise ValueError("its shards are out of order or beyond the last")
    if ((part["label"] < -1) | (part["label"] >= bounds.classes)).any():
        raise ValueError(f"it has labels beyond the {bounds.classes} classes in dataset.json")
    width, height = part["width"], part["height"]
    sides = all(((side >= 1) & (side <= LONGEST)).all() for side in (width, height))
    if not sides or (np.multiply(width, height, dtype=np.int64) > LARGEST).any():
        raise ValueError("it has impossible widths or heights")
    ends = np.repeat(bounds.tar_bytes[shards], counts)
    if (counts < 1).any() or (sizes < 1).any() or (offsets < 512).any() or (offsets > ends - sizes).any():
        raise ValueError("it has frames that do not lie in their tars")
