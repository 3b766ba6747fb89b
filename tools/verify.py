"""Checks a packed dataset down to every byte, label and frame: python -m tools.verify shards/NAME

Held against each other: dataset.json, the catalogue, the tars, their DALI index and the labels inside. DALI
decodes every frame. A sample that stands in two splits is a fault; one that a split holds twice is only told.
"""

import hashlib
import json
import sys
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, combinations, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import tyro
from rich.console import Console
from rich.progress import track

from pipelines.dataset import SCHEMA, DatasetInfo, missing_shards, open_split, read_batch, read_info
from pipelines.errors import UserError, first_line, run_cli
from pipelines.machine import usable_cores
from tools.shards import TOLD, Row, member_names

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

Place = tuple[int, int]  # offset and size in a tar, bytes

SHOWN = 10  # faults told in full
FRAMES_AT_ONCE = 64
BLOCK = tarfile.BLOCKSIZE


@dataclass
class Tally:
    """What the catalogue of one split lists."""

    samples: int = 0
    rejected: int = 0
    frames: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    digests: array = field(default_factory=lambda: array("Q"))  # the first 64 bits of each sample's sha256


def verify(root: tyro.conf.Positional[Path]) -> int:
    """Check the packed dataset in the folder `root`; return 1 if there is any fault, else 0."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    info = read_info(root)
    tallies = {split: Tally() for split in info.splits}
    faults: list[str] = []
    for split, tally in tallies.items():
        found = list(check_split(info, split, tally))
        faults += found
        console.print(f"{split}: {describe(info, tally)}; faults: {len(found)}")
    faults += leaks(info, tallies)
    for fault in faults[:SHOWN]:
        console.print(f"fault: {fault}")
    if len(faults) > SHOWN:
        console.print(f"and {len(faults) - SHOWN} more faults")
    return int(bool(faults))


def describe(info: DatasetInfo, tally: Tally) -> str:
    """Counts, class balance and repeated samples of a split, in a line."""
    parts = [f"{tally.samples} samples, {tally.rejected} rejected, {tally.frames} frames"]
    if info.classes and tally.samples:
        counts = [tally.labels[label] for label in range(len(info.classes))]
        empty = f", {counts.count(0)} without any" if not all(counts) else ""
        several = "classes" if len(counts) > 1 else "class only, nothing to tell apart:"
        parts.append(f"{len(counts)} {several} of {min(counts)} to {max(counts)} samples{empty}")
    if twice := len(tally.digests) - len(set(tally.digests)):
        parts.append(f"repeated samples: {twice}")
    return "; ".join(parts)


def check_split(info: DatasetInfo, split: str, tally: Tally) -> Iterator[str]:
    """Check every shard of a split, one sentence a fault; fill `tally`."""
    said = info.splits[split]
    path = info.catalogue(split)
    tars = [info.tar_path(split, shard) for shard in range(said["shards"])]
    expected = {*tars, *(tar.with_suffix(".idx") for tar in tars)}
    for tar in (tars[shard] for shard in missing_shards(info, split)):
        yield f"{tar} is missing or not of the length it was packed with; pack this dataset again"
    for strange in sorted({*(info.root / split).glob("[!.]*")} - expected):
        yield f"{strange} belongs to no shard; delete it"
    try:
        open_split(info, split)
        shards = track(tars, split, transient=True, console=Console(stderr=True))
        for tar, rows in zip(shards, rows_by_shard(path, len(tars), tally), strict=True):
            yield from check_shard(info, tar, rows)
    except UserError as error:
        yield str(error)
        return
    for name in ("samples", "rejected", "frames"):
        if said[name] != (count := getattr(tally, name)):
            yield f"{path} lists {count} {name}, dataset.json says {said[name]}; pack this dataset again"


def rows_by_shard(path: Path, shards: int, tally: Tally) -> Iterator[list[Row]]:
    """What `read_rows` gives, shard after shard; of one whose samples were all rejected nothing."""
    listed = groupby(read_rows(path, tally), key=lambda row: row["shard"])
    number, rows = next(listed, (-1, iter(())))
    for shard in range(shards):
        if shard != number:
            yield []
            continue
        yield list(rows)
        number, rows = next(listed, (-1, iter(())))


def read_rows(path: Path, tally: Tally) -> Iterator[Row]:
    """The packed samples in order of a catalogue that opens; all rows are counted in `tally`.

    Raises UserError for one that opens and yet cannot be read to its end.
    """
    try:
        batch = read_batch(path, SCHEMA.names)
        parts = (batch.slice(first, 256).to_pylist() for first in range(0, len(batch), 256))
        for row in chain.from_iterable(parts):
            if row["status"] != "ok":
                tally.rejected += 1
                continue
            tally.samples += 1
            tally.frames += row["frames"]
            tally.labels[row["label"]] += 1
            tally.digests.append(int(row["sha256"][:16], 16))
            yield row
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); pack this dataset again") from error


def leaks(info: DatasetInfo, tallies: dict[str, Tally]) -> Iterator[str]:
    """Name every sample that stands in two splits: a validation score is worth nothing with those."""
    for one, other in combinations(tallies, 2):
        if common := set(tallies[one].digests) & set(tallies[other].digests):
            first, second = (holders(info.catalogue(split), common) for split in (one, other))
            for digest in sorted(common):
                same = f"{second[digest]} in {other} has the same frames as {first[digest]} in {one}"
                yield f"{same}; take one of them out of the source and pack it again"


def holders(path: Path, digests: set[int]) -> dict[int, str]:
    """For each digest a sample that has it, as "KEY (SOURCE)"."""
    rows = ((int(row["sha256"][:16], 16), row) for row in read_rows(path, Tally()))
    return {digest: f"{row['key']} ({row['source']})" for digest, row in rows if digest in digests}


def check_shard(info: DatasetInfo, path: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Check a tar and its index against the catalogue's rows, which must be its samples in order."""
    index = [f"v1.2 {len(rows)}"]
    good = []
    try:
        tar = np.frombuffer(path.read_bytes(), np.uint8)
        indexed = path.with_suffix(".idx").read_text(errors="replace")
        for row, names, places in walk(tar, info.kind, rows):
            said = list(sample_faults(info, tar, row, places))
            yield from (f"{path}: {row['key']}: {sentence}" for sentence in said)
            good += [row] if not said else []
            entries = zip(names, places, strict=True)
            index.append(" ".join(f"{name} {at} {size} {row['key']}.{name}" for name, (at, size) in entries))
    except OSError as error:
        yield f"{path} or its .idx cannot be read: {error.strerror}; pack this dataset again"
        return
    except ValueError as error:
        yield f"{path}: {error}; pack this dataset again"
        return
    if indexed != "\n".join([*index, ""]):
        yield f"{path.with_suffix('.idx')} does not fit its tar; pack this dataset again"
    yield from (f"{path}: {sentence}" for sentence in decode_faults(tar, good))


def walk(tar: np.ndarray, kind: str, rows: Sequence[Row]) -> Iterator[tuple[Row, list[str], list[Place]]]:
    """Each sample, its files' extensions and places. Raises ValueError where the tar has something else."""
    at = 0
    for row in rows:
        names = member_names(kind, row["frames"])
        places = []
        for name in names:
            offset, size = find_member(tar, at, f"{row['key']}.{name}")
            places.append((offset, size))
            at = offset + size + -size % BLOCK
        yield row, names, places
    if len(tar) < at + 2 * BLOCK or tar[at:].any():
        raise ValueError(f"its end should come at byte {at}, where it is cut off, damaged or holds more")


def find_member(tar: np.ndarray, at: int, name: str) -> Place:
    """The place of the file whose header is at byte `at`. Raises ValueError unless it is `name` and whole."""
    block = tar[at : at + BLOCK].tobytes()
    try:
        header = tarfile.TarInfo(name)
        header.size = tarfile.TarInfo.frombuf(block, "ascii", "strict").size
        end = at + BLOCK + header.size
        padded = end + -header.size % BLOCK
        as_packed = block == header.tobuf(tarfile.USTAR_FORMAT)
        if as_packed and padded <= len(tar) and not tar[end:padded].any():
            return at + BLOCK, header.size
    except (tarfile.HeaderError, ValueError):
        pass
    raise ValueError(f"{name} should stand at byte {at}, where the tar is cut off, damaged or holds another")


def sample_faults(info: DatasetInfo, tar: np.ndarray, row: Row, places: Sequence[Place]) -> Iterator[str]:
    """Check a sample's places, checksum and labels; whether its frames decode is looked at later."""
    *frames, label, told = [tar[offset : offset + size].tobytes() for offset, size in places]
    if places[:-2] != list(zip(row["offsets"], row["sizes"], strict=False)):
        yield "its frames are not where the catalogue has them"
    digests = (hashlib.sha256(b"".join(frames)).hexdigest(), [zlib.crc32(frame) for frame in frames])
    if digests != (row["sha256"], row["crcs"]):
        yield "its checksum differs: the frames are not those that were packed"
    if label != b"%d" % row["label"]:
        yield f"its .cls has label {label.decode('ascii', 'replace')}, the catalogue {row['label']}"
    known = ("", *info.classes)
    if not 0 <= row["label"] + 1 < len(known) or row["class_name"] != known[row["label"] + 1]:
        yield f"dataset.json has no class {row['class_name']!r} with label {row['label']}"
    try:
        if json.loads(told) != {name: row[name] for name in TOLD}:
            yield "its .json differs from the catalogue"
    except (ValueError, RecursionError):
        yield "its .json is damaged"


def decode_faults(tar: np.ndarray, rows: Sequence[Row]) -> Iterator[str]:
    """Decode every frame of `rows` as training will, and hold its size against the catalogue's."""
    frames = [
        (f"{row['key']}: frame {number} at byte {offset}", tar[offset : offset + size], row)
        for row in rows
        for number, (offset, size) in enumerate(zip(row["offsets"], row["sizes"], strict=True))
    ]
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        names, jpegs, owners = zip(*frames[start : start + FRAMES_AT_ONCE], strict=True)
        sizes = decode(jpegs) or [size for jpeg in jpegs for size in decode([jpeg]) or [(0, 0)]]
        for name, size, row in zip(names, sizes, owners, strict=True):
            if size == (0, 0):
                yield f"{name} does not decode"
            elif size != (row["width"], row["height"]):
                yield f"{name} is {size[0]}x{size[1]}, in the catalogue {row['width']}x{row['height']}"


def decode(jpegs: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """The (width, height) of each decoded JPEG; an empty list if one fails, which DALI does not name."""
    try:
        decoder().feed_input("jpegs", list(jpegs))
        (pictures,) = decoder().run()
        return [(width, height) for height, width, _ in pictures.shape()]
    except RuntimeError:
        decoder.cache_clear()  # a pipeline that failed once stays dead
        return []


@cache
def decoder() -> "Pipeline":
    """A DALI pipeline from JPEGs fed as "jpegs" to pixels, on the CPU."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(FRAMES_AT_ONCE, usable_cores(), None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(name="jpegs"), device="cpu"))
    pipeline.build()
    return pipeline


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(verify)))
