"""Write a packed dataset: WebDataset tars, a DALI index and an Arrow catalogue (shards/README.md).

`pack_shard` writes one shard: a plain function of a picklable job, for any scheduler. A shard is a fixed
slice of the plan, which depends only on the source files, not on workers or interruptions.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.dataset import FORMAT_VERSION, SCHEMA
from pipelines.files import atomic_text, atomic_write, sha256_of
from tools.images import TRANSIENT, BadImage, Packed
from tools.sources import PAUSES, Part, read_source
from tools.tarfiles import TarWriter, add_member, tar_writer

PLAN_FILE = ".plan.json"
JSON_FIELDS = ("label", "class_name", "source", "width", "height", "frames")  # columns copied to KEY.json


@dataclass(frozen=True)
class Packing:
    """What decides the bytes of a shard, besides the source files."""

    short_side: int
    shard_size: int
    max_pixels: int
    val_fraction: float
    pillow: str  # version; others may encode other bytes
    # the same of torch, which resizes
    torch: str = field(default_factory=lambda: version("torch"), kw_only=True)


@dataclass(frozen=True)
class ClipPacking(Packing):
    """The same for clips."""

    fps: float  # stored frames per second
    max_seconds: float  # longer clips are cut
    clip_seconds: float  # about the length of their parts
    source_fps: float  # frames per second of folders of frames


@dataclass(frozen=True)
class VideoPacking(ClipPacking):
    """The same for clips decoded from videos."""

    av: str  # version; others may decode other pixels


@dataclass(frozen=True, slots=True)
class Sample:
    """One source: an image file, a folder of frames or a video. A long video becomes several samples."""

    key: str
    label: int
    class_name: str
    source: str  # path below the source folder
    others: tuple[str, ...] = ()  # other files of the same video, read if that one cannot be packed


Row = dict[str, Any]  # one row of the catalogue
Load = Callable[[Path, str, Packing], Iterator[Part]]


@dataclass(frozen=True)
class Job:
    """One shard to write.

    `load(root, source, packing)` yields the samples of a source, and for each part that is rejected a
    `BadImage`; it raises `BadImage` if nothing can be packed.
    """

    root: Path
    folder: Path
    shard: int
    samples: Sequence[Sample]
    kind: str
    packing: Packing
    load: Load
    reject_unreadable: bool = False  # otherwise the shard is not written if the storage fails

    def read(self, sample: Sample, pauses: Sequence[float] = ()) -> Iterator[tuple[str, Part]]:
        """The samples of a source with their paths, as `read_source` yields them."""
        paths = sample.source, *sample.others
        return read_source(lambda path: self.load(self.root, path, self.packing), paths, pauses)


@dataclass(frozen=True)
class PackPlan:
    """A dataset to pack: the samples of each split in their final order."""

    kind: str
    classes: Sequence[str]
    splits: Mapping[str, Sequence[Sample]]
    packing: Packing
    left_out: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # other files: count, example

    def settings(self) -> dict[str, object]:
        """What must be equal for a run to keep the shards of an earlier one."""
        return {**asdict(self.packing), "source_sha256": self.source_sha256}

    @cached_property
    def source_sha256(self) -> str:
        """The sha256 of the samples in their order; for a million, it takes seconds."""
        digest = hashlib.sha256()
        for split, samples in self.splits.items():
            for sample in samples:
                named = [split, sample.key, sample.label, sample.class_name, sample.source]
                digest.update(json.dumps(named).encode())
        return digest.hexdigest()


def make_key(index: int, name: str) -> str:
    """A sample key that tar, WebDataset and DALI accept: a unique index and a readable name."""
    return f"{index:08d}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:60]}"


def shuffled(count: int) -> np.ndarray:
    """A fixed permutation [count]. Samples sorted by class would ruin training."""
    return np.argsort(np.random.PCG64(0).random_raw(count), kind="stable")


def readable(text: str) -> str:
    """A file name as valid Unicode; bytes that cannot be decoded become question marks."""
    return text.encode("utf-8", "replace").decode()


class Result(NamedTuple):
    """Counts of a shard. If some samples are unreadable, it is not written."""

    sources: int
    rejected: int  # samples
    unreadable: int = 0  # samples
    example: str = ""  # an unreadable source and the reason


class _UnreadableError(Exception):
    """Some samples of a shard could not be read."""


def pack_shard(job: Job) -> Result:
    """Write the tar, the index and the rows of a shard, unless the storage fails to deliver some samples.

    The rows are written last: they mark the shard as done. Raises `OSError` if the shard cannot be written.
    """
    stem = job.folder / f"{job.shard:06d}"
    rows: list[Row] = []
    unreadable: list[str] = []
    try:
        with (
            atomic_write(stem.with_suffix(".tar")) as path,
            path.open("wb") as file,
            tar_writer(file) as tar,
        ):
            lines = [line for sample in job.samples for line in _add(tar, sample, job, rows, unreadable)]
            if unreadable:
                raise _UnreadableError
    except _UnreadableError:
        return Result(0, 0, len(unreadable), unreadable[0])
    index = [line for line in lines if line]
    atomic_text(stem.with_suffix(".idx"), "".join([f"v1.2 {len(index)}\n", *index]))
    with atomic_write(stem.with_suffix(".parquet")) as path:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    return Result(len(job.samples), len(rows) - len(lines))


def _add(tar: TarWriter, source: Sample, job: Job, rows: list[Row], unreadable: list[str]) -> Iterator[str]:
    """Append the samples of a source to the tar and their rows to `rows`; yield their index lines, "" for one
    that stays where it is.

    If the storage fails to deliver the source, it is added to `unreadable`. Later samples of the shard are
    then read only once, so that a shard waits for an outage once.
    """
    try:
        for number, (path, part) in enumerate(job.read(source, () if unreadable else PAUSES)):
            key = f"{source.key}-{number}" if part.span else source.key
            sample = replace(source, key=key, source=path + part.span)
            rows.append(rejected(sample, str(part) if isinstance(part, BadImage) else "") | part.row)
            if isinstance(part, Packed):
                yield _add_sample(tar, rows[-1], part, job)
    except BadImage as error:
        rows.append(rejected(source, str(error)))
    except OSError as error:
        rows.append(rejected(source, f"cannot be read: {error.strerror}"))
        if error.errno in TRANSIENT and not job.reject_unreadable:
            unreadable.append(f"{readable(source.source)} ({error.strerror})")


def rejected(sample: Sample, reason: str) -> Row:
    """The row of a sample that is not packed."""
    row = asdict(sample) | {"source": readable(sample.source), "frames": 0, "shard": -1}
    row |= {"status": "rejected", "reason": reason, "change": "", "width": 0, "height": 0, "sha256": ""}
    return row | {"offsets": [], "sizes": [], "crcs": []}


def _add_sample(tar: TarWriter, row: Row, packed: Packed, job: Job) -> str:
    """Append one sample to the tar, unless its row has its place; complete the row, return its index line."""
    row |= {"status": "ok", "change": packed.change, "shard": job.shard, "frames": len(packed.frames)}
    row["width"], row["height"] = packed.size
    row["sizes"], row["crcs"] = list(map(len, packed.frames)), list(map(zlib.crc32, packed.frames))
    row["sha256"] = hashlib.sha256(b"".join(packed.frames)).hexdigest()
    if row["offsets"]:
        return ""
    line, row["offsets"] = append_sample(tar, row, packed.frames, job.kind)
    return line


def append_sample(tar: TarWriter, row: Row, frames: Sequence[bytes], kind: str) -> tuple[str, list[int]]:
    """Append a sample's files: frames, label, description. Returns its index line and its frames' offsets."""
    names = ["jpg"] if kind == "image" else [f"f{n:04d}.jpg" for n in range(len(frames))]
    description = json.dumps({name: row[name] for name in JSON_FIELDS}, ensure_ascii=False)
    contents = [*frames, b"%d" % row["label"], description.encode()]
    key, places, offsets = row["key"], [], []
    for name, data in zip([*names, "cls", "json"], contents, strict=True):
        offsets.append(add_member(tar, key, name, data))
        places.append(f"{name} {offsets[-1]} {len(data)} {key}.{name}")
    return " ".join(places) + "\n", offsets[: len(frames)]


def jobs_of(plan: PackPlan, root: Path, out: Path, load: Load, reject_unreadable: bool = False) -> list[Job]:
    """Every shard of the plan, in order; training shards first."""
    size, rest = plan.packing.shard_size, (plan.kind, plan.packing, load, reject_unreadable)
    return [
        Job(root, out / split, start // size, samples[start : start + size], *rest)
        for split, samples in plan.splits.items()
        for start in range(0, len(samples), size)
    ]


def is_done(job: Job) -> bool:
    """True if an earlier run wrote this shard."""
    return (job.folder / f"{job.shard:06d}.parquet").exists()


def finish(plan: PackPlan, out: Path) -> None:
    """Merge the rows of all shards into a catalogue per split; write dataset.json last."""
    counts = {split: merge(out, split) for split in plan.splits}
    tars = {split: sorted((out / split).glob("[0-9]*.tar")) for split in plan.splits}
    write_info(plan, out, counts, tars, {})


def write_info(
    plan: PackPlan,
    out: Path,
    counts: Mapping[str, dict[str, int]],
    tars: Mapping[str, Sequence[Path]],
    more: Mapping[str, object],
) -> None:
    """Write dataset.json. counts, tars: of each split; more: further entries."""
    info = {
        "format": FORMAT_VERSION,
        "kind": plan.kind,
        "classes": list(plan.classes),
        "splits": counts,
        "packing": plan.settings(),
        **more,
        "tar_bytes": {split: [tar.stat().st_size for tar in paths] for split, paths in tars.items()},
        "catalogue_sha256": {split: sha256_of(out / f"{split}.arrow") for split in tars},
    }
    atomic_text(out / "dataset.json", json.dumps(info, indent=1, ensure_ascii=False) + "\n")


def merge(out: Path, split: str) -> dict[str, int]:
    """Join out/split/*.parquet in shard order into out/split.arrow; return the split's counts."""
    parts = sorted((out / split).glob("[0-9]*.parquet"))
    tables = [pq.read_table(part).cast(SCHEMA) for part in parts]
    rows = pa.concat_tables([SCHEMA.empty_table(), *tables])
    return write_split(out / f"{split}.arrow", rows, len(parts))


def write_split(catalogue: Path, rows: pa.Table, shards: int) -> dict[str, int]:
    """Write the catalogue of a split; return the split's counts."""
    write_catalogue(catalogue, rows)
    good = rows["status"].to_pylist().count("ok")
    frames = pc.sum(rows["frames"]).as_py() or 0  # pyrefly: ignore
    return {"samples": good, "rejected": len(rows) - good, "frames": frames, "shards": shards}


def write_catalogue(path: Path, rows: pa.Table) -> None:
    """Write rows [SCHEMA] as one record batch: packed samples first, then rejected ones, each in order."""
    packed = pc.equal(rows["status"], "ok")  # pyrefly: ignore
    masks, columns = (packed, pc.invert(packed)), []  # pyrefly: ignore
    for column in rows.columns:  # one after the other: of a large dataset each takes gigabytes
        chunks = [chunk for mask in masks for chunk in column.filter(mask).chunks]
        columns.append(pa.concat_arrays(chunks or [pa.array([], column.type)]))
    with atomic_write(path) as temporary, pa.ipc.new_file(str(temporary), SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
