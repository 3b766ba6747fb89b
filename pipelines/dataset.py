"""A packed dataset: one Arrow catalogue per split, which places every frame in its tar; checked reads."""

import errno
import json
import os
import re
import resource
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.errors import UserError, check_local, first_line
from pipelines.files import arrow_batch, length_of, open_regular, sha256_of

FORMAT_VERSION = 3

# One row per source sample of a split; written by tools/shards.py, the rejected ones last.
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("label", pa.int32()),  # -1: unlabelled
        ("class_name", pa.large_string()),
        ("source", pa.large_string()),  # path below the source folder
        ("status", pa.large_string()),  # "ok" or "rejected"
        ("reason", pa.large_string()),  # why it was rejected, else ""
        ("change", pa.large_string()),  # "copied", or what was done to make it readable
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int32()),
        ("shard", pa.int32()),  # -1: rejected
        ("offsets", pa.large_list(pa.int64())),  # byte offset of every frame's JPEG in its tar
        ("sizes", pa.large_list(pa.int32())),  # its length in bytes
        ("crcs", pa.large_list(pa.uint32())),  # zlib.crc32 of its bytes, checked on every read
        ("sha256", pa.large_string()),  # over the frames' bytes in order
    ]
)
PER_SAMPLE = ("shard", "label", "width", "height")  # columns that are read, of samples and of their frames
PER_FRAME = {"offset": "offsets", "size": "sizes", "crc": "crcs"}  # name in Dataset -> column
MAPPED = 64 << 20  # bytes from which a catalogue is mapped, so that processes share it
LONGEST, LARGEST = 65_535, 1 << 30  # pixels on a JPEG's side; pixels that a decoder takes


@dataclass(frozen=True)
class DatasetInfo:
    """The contents of `dataset.json`."""

    root: Path
    kind: str  # "image" or "video"
    classes: tuple[str, ...]
    splits: dict[str, dict[str, int]]  # by split, COUNTS
    packing: dict[str, object]
    tar_bytes: dict[str, list[int]]  # by split, the length of every shard's tar
    catalogue_sha256: dict[str, str] = field(default_factory=dict)  # by split
    tars: dict[str, list[str]] = field(default_factory=dict)  # by split, paths of tars that others wrote

    @property
    def fps(self) -> float | None:
        """Stored frames per second of clips; None where packing did not record it."""
        return self.packing.get("fps")  # pyrefly: ignore

    def tar_path(self, split: str, shard: int) -> Path:
        return self.root / (self.tars[split][shard] if self.tars else f"{split}/{shard:06d}.tar")

    def catalogue(self, split: str) -> Path:
        return self.root / f"{split}.arrow"


@dataclass(frozen=True, eq=False)
class Dataset:
    """The readable samples of one split; a sample's id is its row here, N samples, F frames in all.

    Frames of sample `i` are `first_frame[i]:first_frame[i + 1]` of `offset`, `size` and `crc`.
    """

    info: DatasetInfo
    split: str
    shard: np.ndarray  # [N] int32, ascending
    label: np.ndarray  # [N] int32, -1: unlabelled
    width: np.ndarray  # [N] int32, pixels
    height: np.ndarray  # [N] int32, pixels
    first_frame: np.ndarray  # [N + 1] int64
    offset: np.ndarray  # [F] int64, bytes from the start of the sample's tar
    size: np.ndarray  # [F] int32, bytes
    crc: np.ndarray  # [F] uint32

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def catalogue(self) -> Path:
        return self.info.catalogue(self.split)

    def frame_counts(self, ids: np.ndarray) -> np.ndarray:
        """Frames of each sample, [n] int64."""
        return self.first_frame[ids + 1] - self.first_frame[ids]

    def tar_path(self, shard: int) -> Path:
        return self.info.tar_path(self.split, shard)

    @cached_property
    def _tar(self) -> Callable[[int], "Tar"]:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # often 1,024, and all splits share it
        return lru_cache(limit // 4)(lambda shard: Tar(self.tar_path(shard)))

    def read(self, ids: np.ndarray, frames: np.ndarray) -> list[np.ndarray]:
        """The JPEGs of frames [n, T] of samples ids [n], sample after sample: n * T x uint8 [bytes].

        A JPEG is empty if its checksum differs, it is cut off, or the disk fails. Raises UserError when a tar
        cannot be opened.
        """
        rows = self.first_frame[ids][:, None] + frames
        tars = [self._tar(shard) for shard in self.shard[ids].tolist() for _ in range(frames.shape[1])]
        places = (column[rows.ravel()].tolist() for column in (self.offset, self.size, self.crc))
        return [tar.read(*place) for tar, *place in zip(tars, *places, strict=True)]

    def member_name(self, sample: int, frame: int) -> str:
        """A frame's name in its tar, as "KEY.f0003.jpg", or the sample's id where the header is damaged."""
        start = int(self.offset[self.first_frame[sample] + frame])
        name = ""
        with suppress(OSError):
            header = os.pread(self._tar(int(self.shard[sample])).descriptor, 100, start - 512)
            name = header.rstrip(b"\0").decode("ascii", "replace")
        return name if name.isprintable() and name else f"sample {sample}"

    def will_need(self, ids: np.ndarray, frames: np.ndarray) -> None:
        """Prefetch frames [n, T] of samples ids [n] into the page cache, one read per sample."""
        rows = self.first_frame[ids][:, None] + frames
        low, high = rows.min(axis=1), rows.max(axis=1)
        starts, ends = self.offset[low], self.offset[high] + self.size[high]
        for shard, start, end in zip(self.shard[ids].tolist(), starts.tolist(), ends.tolist(), strict=True):
            descriptor = self._tar(shard).descriptor
            with suppress(OSError):  # a hint: failure does not matter
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


class Tar:
    """An open tar, closed with the last reference to it; raises UserError when it cannot be opened.

    It is not mapped into memory: if a mapped file shrinks or its disk fails, reading it kills the process.
    """

    descriptor = -1

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = open_regular(path)
        except OSError as error:
            if error.errno != errno.EINVAL:  # that is a folder, pipe or device: its frames count as damaged
                what = f"{path} cannot be opened ({error.strerror})"
                raise UserError(f"{what}; restore it, or pack this dataset again") from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read(self, offset: int, size: int, crc: int) -> np.ndarray:
        """The bytes at `offset`, uint8 [size], or an empty array unless they have the checksum `crc`."""
        try:
            data = os.pread(self.descriptor, size, offset)
        except OSError:
            data = b""
        return np.frombuffer(data if zlib.crc32(data) == crc else b"", np.uint8)


def read_info(root: Path | str) -> DatasetInfo:
    """Read `dataset.json`. Raises UserError when the folder, the file or its format is not as expected."""
    check_local(root)
    root = Path(root)
    path = root / "dataset.json"
    if not root.is_dir():
        raise UserError(f"{root} does not exist; pack a dataset there with `make shards` or `make demo`")
    if not path.is_file():
        for inner in sorted(root.glob("*/dataset.json")):
            raise UserError(f"{root} has no dataset.json; is {inner.parent} meant?")
        raise UserError(
            f"{root} has no dataset.json: if these are pictures or frames, pack them first (`make shards`) "
            "and name the result; if these are shards, their packing did not finish, so run it again"
        )
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT_VERSION:
            convert = f"convert it with `python -m tools.format3 {root}`"
            raise UserError(
                f"{path} has format {raw['format']}, this version reads {FORMAT_VERSION}; "
                f"{convert if raw['format'] == 2 else 'pack it again'}"
            )
        check_info(raw)
        listed = raw["splits"], raw["packing"], raw["tar_bytes"], raw["catalogue_sha256"], raw.get("tars", {})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged ({error!r}); pack this dataset again") from error
    return DatasetInfo(root, raw["kind"], tuple(raw["classes"]), *listed)


def check_info(raw: dict[str, Any]) -> None:
    """Raise ValueError, or what comes of a wrong type, unless `raw` is what packing writes."""
    classes = raw["classes"]
    "".join(classes).encode()  # fails for what is no text
    fps = dict(raw["packing"]).get("fps", 30)
    if raw["kind"] not in ("image", "video") or raw["packing"] != dict(raw["packing"]) or fps is True:
        raise ValueError("kind or packing")
    if not 0 < fps <= 1000:
        raise ValueError("frames per second")
    if not isinstance(classes, list) or len(set(classes)) < len(classes):
        raise ValueError("classes")
    tars = raw.get("tars", {})
    for split, counts in raw["splits"].items():
        lengths = raw["tar_bytes"][split]
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
            raise ValueError(f"a split named {split!r}")
        numbers = [*(counts[name] for name in ("samples", "rejected", "frames", "shards")), *lengths]
        names = tars[split] if tars else [""] * len(lengths)
        fit = type(names) is list and len(names) == len(lengths) == counts["shards"]
        if not fit or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"counts of {split}")
        digest = raw["catalogue_sha256"][split]
        if b"\0" in "".join(names).encode() or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"tars or catalogue_sha256 of {split}")


def missing_shards(info: DatasetInfo, split: str) -> list[int]:
    """The shards whose tar is missing or has another length than when it was packed."""
    return [n for n, size in enumerate(info.tar_bytes[split]) if length_of(info.tar_path(split, n)) != size]


def check_shards(info: DatasetInfo) -> None:
    """Raise UserError when a tar is missing or has another length than when it was packed."""
    for split in info.splits:
        for shard in missing_shards(info, split):
            tar = info.tar_path(split, shard)
            what = "has another length than when it was packed" if length_of(tar) >= 0 else "is missing"
            raise UserError(f"{tar} {what}; restore it, or pack {info.root} again")


def open_dataset(root: Path | str, split: str) -> Dataset:
    """Open the readable samples of a split. Raises UserError when something is missing or damaged."""
    return open_split(read_info(root), split)


def open_split(info: DatasetInfo, split: str) -> Dataset:
    """`open_dataset` of a dataset whose dataset.json has been read."""
    if split not in info.splits:
        raise UserError(f"{info.root} has no split {split!r}, only {', '.join(sorted(info.splits))}")
    path = info.catalogue(split)
    if not path.is_file():
        raise UserError(f"{path} is missing; pack this dataset again")
    with reading(path):
        if sha256_of(path) != info.catalogue_sha256[split]:
            raise ValueError("its checksum is not the one in dataset.json")
        numbers = numbers_of(read_batch(path, (*PER_SAMPLE, "frames", *PER_FRAME.values())), info, split)
    return Dataset(info, split, **numbers)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise UserError if the block finds that a catalogue is damaged or cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); pack this dataset again") from error


def read_batch(path: Path, columns: Sequence[str]) -> pa.RecordBatch:
    """These columns of a catalogue. Raises UserError for one that is damaged."""
    with reading(path):
        batch = arrow_batch(path, SCHEMA, MAPPED).select(columns)
        batch.validate(full=True)
        return batch


def numbers_of(batch: pa.RecordBatch, info: DatasetInfo, split: str) -> dict[str, np.ndarray]:
    """The numbers of the packed samples by the names `Dataset` gives them, without copying them.

    Raises ValueError for numbers that cannot be, ArrowException for missing ones.
    """
    counts = info.splits[split]
    samples = counts["samples"]
    if len(batch) != (rows := samples + counts["rejected"]):
        raise ValueError(f"it has {len(batch)} rows, but dataset.json has {rows}")
    found = {name: batch[name].to_numpy() for name in (*PER_SAMPLE, "frames")}
    lists, frames = [batch[column] for column in PER_FRAME.values()], found.pop("frames")
    starts = [values.offsets.to_numpy() for values in lists]
    if any(at[0] or (np.diff(at) != frames).any() for at in starts) or any(x.null_count for x in lists):
        raise ValueError("its lists do not have one entry per frame")
    first_frame = starts[0][: samples + 1]
    if (found["shard"][:samples] < 0).any() or (found["shard"][samples:] >= 0).any():
        raise ValueError(f"its packed samples are not its first {samples} rows")
    numbers = {name: column[:samples] for name, column in found.items()} | {"first_frame": first_frame}
    for name, values in zip(PER_FRAME, lists, strict=True):
        numbers[name] = values.values.to_numpy()[: first_frame[-1]]
    check_numbers(numbers, len(info.classes), np.array(info.tar_bytes[split], np.int64))
    return numbers


def check_numbers(numbers: dict[str, np.ndarray], classes: int, tar_bytes: np.ndarray) -> None:
    """Raise ValueError for numbers that cannot be; `tar_bytes` [shards] is the length of each tar."""
    shard, label, width, height = (numbers[name] for name in PER_SAMPLE)
    if (np.diff(shard) < 0).any() or (shard >= len(tar_bytes)).any():
        raise ValueError("its shard numbers are out of order or too large")
    if ((label < -1) | (label >= classes)).any():
        raise ValueError(f"it has labels beyond the {classes} classes in dataset.json")
    sides = all(((side >= 1) & (side <= LONGEST)).all() for side in (width, height))
    if not sides or (np.multiply(width, height, dtype=np.int64) > LARGEST).any():
        raise ValueError("it has impossible widths or heights")
    starts = numbers["first_frame"]
    edges = starts[np.searchsorted(shard, np.arange(len(tar_bytes) + 1, dtype=shard.dtype))]
    outside = (np.diff(starts) < 1).any()
    for (first, last), length in zip(pairwise(edges), tar_bytes, strict=True):  # by shard, for memory
        offset, size = numbers["offset"][first:last], numbers["size"][first:last]
        outside |= (size < 1).any() or (offset < 512).any() or (offset > length - size).any()
    if outside:
        raise ValueError("it has frames outside their tars")
