"""Check every byte, label and frame of a packed dataset: python -m tools.verify shards/NAME

dataset.json, the catalogue, the tars with their labels, and the DALI indexes are compared with each other.
DALI decodes every frame. A sample that is in two splits is a fault; a sample that is twice in one split is
counted.
"""

import hashlib
import sys
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from itertools import chain, combinations, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track

from pipelines.dataset import SCHEMA, DatasetInfo, missing_shards, open_split, read_batch, read_info
from pipelines.errors import UserError, first_line, run_cli
from pipelines.machine import usable_cores
from tools.images import BadImage
from tools.shards import Row, index_line, members, readable
from tools.tarfiles import ForeignTar, samples_in
from tools.tarsamples import frames_of, label_in

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

SHOWN = 10  # faults that are printed
FRAMES_AT_ONCE = 64
COMPARED = 16  # the pixels of one frame in so many are compared
LEVELS = 6  # by which two correct decoders may differ on average, of 255
BLOCK = tarfile.BLOCKSIZE


@dataclass
class Tally:
    """Counts of the catalogue of one split."""

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
    """Counts, class balance and repeated samples of a split, in one line."""
    parts = [f"{tally.samples} samples, {tally.rejected} rejected, {tally.frames} frames"]
    if info.classes and tally.samples:
        counts = [tally.labels[label] for label in range(len(info.classes))]
        empty = f", {counts.count(0)} of them empty" if not all(counts) else ""
        several = "classes" if len(counts) > 1 else "class only, so nothing to classify:"
        parts.append(f"{len(counts)} {several} of {min(counts)} to {max(counts)} samples{empty}")
    if twice := len(tally.digests) - len(set(tally.digests)):
        parts.append(f"repeated samples: {twice}")
    return "; ".join(parts)


def check_split(info: DatasetInfo, split: str, tally: Tally) -> Iterator[str]:
    """Check every shard of a split; yield one sentence per fault; fill `tally`."""
    expected = info.splits[split]
    path = info.catalogue(split)
    tars = [info.tar_path(split, shard) for shard in range(expected["shards"])]
    files = {*tars, *(tar.with_suffix(".idx") for tar in tars)}
    for tar in (tars[shard] for shard in missing_shards(info, split)):
        yield f"{tar} is missing or does not have the length that was packed; pack this dataset again"
    for unknown in sorted({*(info.root / split).glob("[!.]*")} - files) if not info.tars else ():
        yield f"{unknown} belongs to no shard; delete it"
    try:
        open_split(info, split)
        shards = track(tars, split, transient=True, console=Console(stderr=True))
        for tar, rows in zip(shards, rows_by_shard(path, len(tars), tally), strict=True):
            yield from (check_foreign if info.tars else check_shard)(info, tar, rows)
    except UserError as error:
        yield str(error)
        return
    for name in ("samples", "rejected", "frames"):
        if expected[name] != (count := getattr(tally, name)):
            yield f"{path} has {count} {name}, dataset.json {expected[name]}; pack this dataset again"


def rows_by_shard(path: Path, shards: int, tally: Tally) -> Iterator[list[Row]]:
    """The rows of `read_rows` shard by shard; empty for a shard whose samples were all rejected."""
    listed = groupby(read_rows(path, tally), key=lambda row: row["shard"])
    number, rows = next(listed, (-1, iter(())))
    for shard in range(shards):
        if shard != number:
            yield []
            continue
        yield list(rows)
        number, rows = next(listed, (-1, iter(())))


def read_rows(path: Path, tally: Tally) -> Iterator[Row]:
    """The packed samples of a catalogue in order; all rows are counted in `tally`.

    Raises UserError if the catalogue opens but cannot be read to its end.
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
    """Name every sample that is in two splits: with it, a validation score means nothing."""
    for one, other in combinations(tallies, 2):
        if common := set(tallies[one].digests) & set(tallies[other].digests):
            first, second = (holders(info.catalogue(split), common) for split in (one, other))
            for digest in sorted(common):
                same = f"{second[digest]} in {other} has the same frames as {first[digest]} in {one}"
                yield f"{same}; remove one of them from the source and pack it again"


def holders(path: Path, digests: set[int]) -> dict[int, str]:
    """For each digest, a sample that has it, as "KEY (SOURCE)"."""
    rows = ((int(row["sha256"][:16], 16), row) for row in read_rows(path, Tally()))
    return {digest: f"{row['key']} ({row['source']})" for digest, row in rows if digest in digests}


def check_shard(info: DatasetInfo, path: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Check a tar and its index against the catalogue's rows, which are its samples in order."""
    index, good, at = [f"v1.2 {len(rows)}\n"], [], 0
    try:
        data = path.read_bytes()
        indexed = path.with_suffix(".idx").read_text(errors="replace")
        for row in rows:
            ends = zip(row["offsets"], row["sizes"], strict=True)
            frames, places = [data[start : start + size] for start, size in ends], []
            for name, content in members(row, frames, info.kind):
                size = member_size(data, at, f"{row['key']}.{name}")
                places.append((name, at + BLOCK, size))
                if data[at + BLOCK : at + BLOCK + size] != content:
                    yield f"{path}: {row['key']}.{name} differs from the catalogue; pack this dataset again"
                at += BLOCK + size + -size % BLOCK
            faults = list(sample_faults(info, row, frames))
            yield from (f"{path}: {row['key']}: {fault}" for fault in faults)
            good += [] if faults else [row]
            index.append(index_line(row["key"], places))
    except OSError as error:
        yield f"{path} or its .idx cannot be read: {error.strerror}; pack this dataset again"
        return
    except ValueError as error:
        yield f"{path}: {error}; pack this dataset again"
        return
    if data[at:] != bytes(2 * BLOCK + -(at + 2 * BLOCK) % tarfile.RECORDSIZE):
        yield f"{path} does not end at byte {at}, it is cut off or damaged; pack this dataset again"
    if indexed != "".join(index):
        yield f"{path.with_suffix('.idx')} does not match its tar; pack this dataset again"
    yield from (f"{path}: {fault}" for fault in decode_faults(np.frombuffer(data, np.uint8), good))


def check_foreign(info: DatasetInfo, path: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Check the catalogue's rows against a tar that another program wrote."""
    try:
        with ForeignTar(path) as tar:
            names = frozenset(str(info.packing.get("class_names", "")).splitlines())
            numbers = {name: n for n, name in enumerate(info.classes)}
            listed: dict[tuple[str, tuple[int, ...]], int] = {}
            for found in samples_in(tar):
                offsets = tuple(found.files[name].offset for name in frames_of(found.files))
                label = -1
                with suppress(BadImage):  # of a sample that was rejected
                    if not info.packing.get("unlabelled"):
                        number, name = label_in(tar, found.files, names)
                        known = numbers.get(name, numbers.get(str(number), -1))
                        label = number if names and number >= 0 else known
                    listed[readable(found.key), offsets] = label
            good = []
            for row in rows:
                label = listed.get((row["key"], tuple(row["offsets"])))
                places = zip(row["offsets"], row["sizes"], strict=True)
                frames = [tar[at : at + size].tobytes() for at, size in places]
                faults = [*sample_faults(info, row, frames)]
                if label != row["label"]:
                    faults.append("the tar has it elsewhere or with another class; index this dataset again")
                yield from (f"{path}: {row['key']}: {fault}" for fault in faults)
                good += [] if faults else [row]
            yield from (f"{path}: {fault}" for fault in decode_faults(tar, good))
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}; restore it or index this dataset again"


def member_size(data: bytes, at: int, name: str) -> int:
    """Size of the file `name`, whose header is at byte `at`. Raises ValueError if it is not there."""
    block, header = data[at : at + BLOCK], tarfile.TarInfo(name)
    try:
        header.size = tarfile.TarInfo.frombuf(block, "ascii", "strict").size
        end, padding = at + BLOCK + header.size, bytes(-header.size % BLOCK)
        as_packed = block == header.tobuf(tarfile.USTAR_FORMAT)
        if as_packed and end <= len(data) and data[end : end + len(padding)] == padding:
            return header.size
    except (tarfile.HeaderError, ValueError):
        pass
    raise ValueError(f"{name} is not at byte {at}, the tar is cut off, damaged or another one")


def sample_faults(info: DatasetInfo, row: Row, frames: Sequence[bytes]) -> Iterator[str]:
    """Check a sample's checksums and class."""
    sums = (hashlib.sha256(b"".join(frames)).hexdigest(), [zlib.crc32(frame) for frame in frames])
    if sums != (row["sha256"], row["crcs"]):
        yield "its checksum differs, so its frames are not those that were packed; pack this dataset again"
    names = ("", *info.classes)
    if not 0 <= row["label"] + 1 < len(names) or row["class_name"] != names[row["label"] + 1]:
        yield f"dataset.json has no class {row['class_name']!r} with label {row['label']}; pack it again"


def decode_faults(tar: np.ndarray | ForeignTar, rows: Sequence[Row]) -> Iterator[str]:
    """Decode every frame of `rows` as training does; compare its size with the catalogue's.

    One frame in `COMPARED` must also have the pixels that Pillow finds, which decoded it for packing.
    """
    frames = (
        (f"{row['key']}: frame {number} at byte {offset}", tar[offset : offset + size], row)
        for row in rows
        for number, (offset, size) in enumerate(zip(row["offsets"], row["sizes"], strict=True))
    )
    while some := list(islice(frames, FRAMES_AT_ONCE)):  # all frames of another program's tar may be too many
        yield from frame_faults(some)


def frame_faults(frames: Sequence[tuple[str, np.ndarray, Row]]) -> Iterator[str]:
    """Decode (name, JPEG, row of the catalogue) of each frame; yield what is wrong with it."""
    found = decode([jpeg for _, jpeg, _ in frames])
    if not found and len(frames) > 1:
        for frame in frames:
            yield from frame_faults([frame])
        return
    for number, (name, jpeg, row) in enumerate(frames):
        packed = (row["height"], row["width"], 3)
        if not found:
            yield f"{name} does not decode; pack this dataset again"
        elif found[number].shape != packed:
            sizes = [f"{width}x{height}" for height, width, _ in (found[number].shape, packed)]
            yield f"{name} is {sizes[0]}, in the catalogue {sizes[1]}; pack this dataset again"
        elif number % COMPARED == 0 and (levels := difference(jpeg, found[number])) > LEVELS:
            yield f"{name} differs by {levels:.0f} levels between DALI and Pillow; pack this dataset again"


def difference(jpeg: np.ndarray, pixels: np.ndarray) -> float:
    """Mean difference, in levels of 255, of `pixels`, uint8 [h, w, 3], from what Pillow decodes."""
    with suppress(OSError):
        other = np.asarray(Image.open(BytesIO(jpeg.tobytes())).convert("RGB"))
        if other.shape == pixels.shape:
            return float(np.abs(other - pixels.astype(np.int16)).mean())
    return 255.0


def decode(jpegs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The pixels, uint8 [h, w, 3], of each JPEG until the next call; [] if one of them fails.

    DALI does not say which one failed.
    """
    try:
        decoder().feed_input("jpegs", list(jpegs))
        (pictures,) = decoder().run()
        return [np.asarray(pictures[index]) for index in range(len(jpegs))]
    except RuntimeError:
        decoder.cache_clear()  # a pipeline that failed cannot run again
        return []


@cache
def decoder() -> "Pipeline":
    """A DALI pipeline on the CPU that decodes the JPEGs fed as "jpegs"."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(FRAMES_AT_ONCE, usable_cores(), None, prefetch_queue_depth=1)
    with pipeline:
        jpegs = fn.external_source(name="jpegs")
        pixels = fn.decoders.image(jpegs, device="cpu", jpeg_fancy_upsampling=True)  # as for training
        pipeline.set_outputs(pixels)
    pipeline.build()
    return pipeline


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(verify)))
