"""Check every byte, label and frame of a packed dataset: python -m tools.verify shards/NAME

dataset.json, the catalogue, the tars with their labels, and the DALI indexes are compared with each other.
DALI decodes every frame. A sample that is in two splits is a fault; a sample that is twice in one split is
counted.
"""

import hashlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track

from pipelines.dataset import SCHEMA, Dataset, DatasetInfo, missing_shards, open_split, read_batch, read_info
from pipelines.errors import UserError, run_cli
from pipelines.machine import usable_cores
from tools.images import BadImage
from tools.shards import Row, append_sample, readable
from tools.tarfiles import ForeignTar, samples_in, tar_writer
from tools.tarsamples import frames_of, label_in

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

SHOWN = 10  # faults that are printed
FRAMES_AT_ONCE = 64
COMPARED = 16  # the pixels of one frame in so many are compared
LEVELS = 6  # by which two correct decoders may differ on average, of 255


def verify(root: tyro.conf.Positional[Path]) -> int:
    """Check the packed dataset in the folder `root`; return 1 if there is any fault, else 0."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    info = read_info(root)
    faults: list[str] = []
    named: dict[str, pa.RecordBatch] = {}
    for split in info.splits:
        try:
            catalogue = open_split(info, split)
            rows = read_batch(catalogue.catalogue, SCHEMA.names)
        except UserError as error:
            faults.append(str(error))
            console.print(f"{split}: its catalogue cannot be read")
            continue
        found = [*check_split(catalogue, rows)]
        named[split] = rows[: len(catalogue)].select(["sha256", "key", "source"])
        console.print(f"{split}: {describe(catalogue, named[split])}; faults: {len(found)}")
        faults += found
    faults += leaks(named)
    for fault in faults[:SHOWN]:
        console.print(f"fault: {fault}")
    if len(faults) > SHOWN:
        console.print(f"and {len(faults) - SHOWN} more faults")
    return int(bool(faults))


def describe(catalogue: Dataset, named: pa.RecordBatch) -> str:
    """Counts, class balance and repeated samples of a split, in one line."""
    expected, classes = catalogue.info.splits[catalogue.split], len(catalogue.info.classes)
    parts = ["{samples} samples, {rejected} rejected, {frames} frames".format_map(expected)]
    if classes and len(catalogue):
        counts = np.bincount(catalogue.label[catalogue.label >= 0], minlength=classes)
        empty = f", {(counts == 0).sum()} of them empty" if not counts.all() else ""
        several = "classes" if classes > 1 else "class (nothing to classify)"
        parts.append(f"{classes} {several} of {counts.min()} to {counts.max()} samples{empty}")
    if twice := len(named) - pc.count_distinct(named["sha256"]).as_py():  # pyrefly: ignore
        parts.append(f"repeated samples: {twice}")
    return "; ".join(parts)


def check_split(catalogue: Dataset, rows: pa.RecordBatch) -> Iterator[str]:
    """Check every shard of a split, whose catalogue has these rows [SCHEMA]; yield one sentence per fault."""
    info, split = catalogue.info, catalogue.split
    expected = info.splits[split]
    tars = [info.tar_path(split, shard) for shard in range(expected["shards"])]
    files = {*tars, *(tar.with_suffix(".idx") for tar in tars)}
    for tar in (tars[shard] for shard in missing_shards(info, split)):
        yield f"{tar} is missing or does not have the length that was packed; pack this dataset again"
    for unknown in sorted({*(info.root / split).glob("[!.]*")} - files) if not info.tars else ():
        yield f"{unknown} belongs to no shard; delete it"
    packed = pc.equal(rows["status"], "ok").to_numpy(zero_copy_only=False)  # pyrefly: ignore
    holes = any(column.null_count for column in rows.columns)
    if holes or (packed != (np.arange(len(rows)) < len(catalogue))).any():
        yield f"{catalogue.catalogue} has rows that are incomplete or out of order; pack this dataset again"
        return
    shards = track(tars, split, transient=True, console=Console(stderr=True))
    for tar, samples in zip(shards, by_shard(catalogue, rows), strict=True):
        yield from (check_foreign if info.tars else check_shard)(info, tar, samples.to_pylist())
    if expected["frames"] != (frames := catalogue.first_frame[-1]):
        wanted = f"{frames} frames, dataset.json {expected['frames']}"
        yield f"{catalogue.catalogue} has {wanted}; pack this dataset again"


def by_shard(catalogue: Dataset, rows: pa.RecordBatch) -> list[pa.RecordBatch]:
    """The packed samples of each shard in order."""
    ends = np.searchsorted(catalogue.shard, np.arange(catalogue.info.splits[catalogue.split]["shards"] + 1))
    return [rows[start:end] for start, end in pairwise(ends.tolist())]


def leaks(named: dict[str, pa.RecordBatch]) -> Iterator[str]:
    """Name every sample that is in two splits: with it, a validation score means nothing.

    named: by split, sha256, key and source of each packed sample.
    """
    for one, other in combinations(named, 2):
        first, second = holders(named[one], named[other]), holders(named[other], named[one])
        for digest in sorted(first):
            same = f"{second[digest]} in {other} has the same frames as {first[digest]} in {one}"
            yield f"{same}; remove one of them from the source and pack it again"


def holders(named: pa.RecordBatch, others: pa.RecordBatch) -> dict[str, str]:
    """For each digest that `others` also has, a sample that has it, as "KEY (SOURCE)"."""
    common = named.filter(pc.is_in(named["sha256"], others["sha256"]))  # pyrefly: ignore
    return {row["sha256"]: f"{row['key']} ({row['source']})" for row in common.to_pylist()}


def check_shard(info: DatasetInfo, path: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Check a tar and its index: the tar's frames, packed again with the catalogue's rows, must give both."""
    index, good, ends, again = [f"v1.2 {len(rows)}\n"], [], [0], BytesIO()
    try:
        data = path.read_bytes()
        indexed = path.with_suffix(".idx").read_text(errors="replace")
    except OSError as error:
        yield f"{path} or its .idx cannot be read: {error.strerror}; pack this dataset again"
        return
    if sum(sum(row["sizes"]) for row in rows) > len(data):
        yield f"{path} is cut off: it is shorter than its samples; pack this dataset again"
        return
    with tar_writer(again) as tar:
        for row in rows:
            if info.kind == "image" and row["frames"] != 1:
                yield f"{path}: {row['key']} is a picture of {row['frames']} frames; pack this dataset again"
                return
            places = zip(row["offsets"], row["sizes"], strict=True)
            frames = [data[start : start + size] for start, size in places]
            index.append(append_sample(tar, row, frames, info.kind)[0])
            ends.append(tar.tarstream.offset)
            faults = list(sample_faults(info, row, frames))
            yield from (f"{path}: {row['key']}: {fault}" for fault in faults)
            good += [] if faults else [row]
    packed = again.getbuffer()
    for row, (start, end) in zip(rows, pairwise(ends), strict=True):
        if data[start:end] != packed[start:end]:
            what = f"its files or labels differ from the catalogue at byte {start} or later"
            yield f"{path}: {row['key']}: {what}; pack this dataset again"
    if data[ends[-1] :] != packed[ends[-1] :]:
        yield f"{path} does not end at byte {len(packed)}: it is cut off or damaged; pack this dataset again"
    if indexed != "".join(index):
        yield f"{path.with_suffix('.idx')} does not match its tar; pack this dataset again"
    yield from (f"{path}: {fault}" for fault in decode_faults(np.frombuffer(data, np.uint8), good))


def check_foreign(info: DatasetInfo, path: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Check the catalogue's rows against a tar that another program wrote."""
    try:
        with ForeignTar(path) as tar:
            names = frozenset(str(info.packing.get("class_names", "")).splitlines())
            key = str(info.packing.get("class_key", ""))
            numbers = {normalize("NFC", name): n for n, name in enumerate(info.classes)}
            listed: dict[tuple[str, tuple[int, ...]], int] = {}
            for found in samples_in(tar):
                offsets = tuple(found.files[name].offset for name in frames_of(found.files))
                label = -1
                with suppress(BadImage):  # of a sample that was rejected
                    if not info.packing.get("unlabelled"):
                        number, name = label_in(tar, found.files, names, key)
                        known = numbers.get(normalize("NFC", name), numbers.get(str(number), -1))
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
