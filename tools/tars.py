"""Index WebDataset tars that other programs wrote, in place: python -m tools.pack tars --train 'a-{0..9}.tar'

Every sample is decoded once. If training can read its bytes unchanged, the catalogue points into the tar.
The others are listed with the reason, or with --repack written into further tars.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from rich.console import Console

from pipelines.dataset import SCHEMA, read_batch, read_info
from pipelines.errors import UserError
from tools.listing import note_gaps, unite
from tools.lists import read_text
from tools.packing import PackOptions, pack_part, report, writing_to
from tools.planfile import begin, check_same
from tools.shards import PackPlan, Sample, jobs_of, rejected, write_info, write_split
from tools.tarfiles import BAD_START, FROM_HERE, REPACKED, WORK, expand
from tools.tarsamples import ANY_SIZE, MADE, PICTURES, SHOWN, TarPacking, first_is_clip, load_tar, not_read

Indexed = tuple[tuple[Path, Path], pa.Table]  # a tar, the tar of its repacked samples, and their rows
Classes = dict[tuple[int, str], str]  # (number or -1, name or "") of a class: a source that has it
NO_CLASS = "it has no class, but other samples have one (--unlabelled ignores all classes)"


@dataclass(frozen=True, kw_only=True)
class TarOptions(PackOptions):
    """Options of indexing tars. Raises UserError for a value out of its range."""

    short_side: int = ANY_SIZE
    """pictures that are repacked are scaled down until their shorter side has this many pixels; those that
    are used in place keep their size"""
    repack: bool = False
    """write samples that training cannot read unchanged (PNG, CMYK, 16 bit, EXIF rotation ...) into
    additional tars; otherwise they are left out"""
    unlabelled: bool = False
    """ignore all classes, as for pretraining"""
    class_key: str = ""
    """NAME: the class of a sample is in the file KEY.NAME, else in the field NAME of KEY.json"""
    class_names: Path | None = None
    """text file with one class name per line, class 0 first"""
    fps: float = 30.0
    """frames per second of the clips in the tars"""

    def packing(self, clips: bool) -> TarPacking:
        """What decides the catalogue."""
        text = read_text(self.class_names, "--class-names") if self.class_names else ""
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if len({*names}) < len(names):
            raise UserError(f"--class-names {self.class_names} has a name twice; number one of them.")
        sizes = (self.short_side, 1, self.max_pixels, self.val_fraction, PIL.__version__, self.fps)
        key = self.class_key.removeprefix(".")
        if f".{key.lower()}" in (".json", *PICTURES):
            raise UserError(
                f"--class-key {key}: .{key} is no class; give another suffix, or a field of .json"
            )
        return TarPacking(*sizes, clips, self.repack, self.unlabelled, "\n".join(names), key)


def pack_tars(
    train: str, options: Annotated[TarOptions, tyro.conf.arg(name="")], val: str = "", out: Path | None = None
) -> int:
    """Index tars that other programs wrote, in place.

    Args:
        train: the tars, such as 'data/train-{0000..1023}.tar'; several lists are separated by ::
        options: see `TarOptions`.
        val: the tars of the validation split, in the same form.
        out: folder for the catalogue; default: the common folder of the tars.
    """
    tars = {split: expand(spec, f"--{split}") for split, spec in (("train", train), ("val", val)) if spec}
    every = [path.absolute() for paths in tars.values() for path in paths]
    counts = Counter(path.resolve() for path in every)
    if repeated := [str(path) for path, count in counts.items() if count > 1]:
        raise UserError(f"--train and --val name {repeated[0]} twice; name each tar once.")
    root = Path(os.path.commonpath([path.parent for path in every]))
    splits = {
        split: [
            Sample(
                f"{path.stem}, {path.stat().st_size} bytes", -1, "", str(path.absolute().relative_to(root))
            )
            for path in paths
        ]
        for split, paths in tars.items()
    }
    clips = first_is_clip(every)
    plan = PackPlan("video" if clips else "image", (), splits, options.packing(clips))
    return index(plan, root, (out or root).absolute(), options)


def index(plan: PackPlan, root: Path, out: Path, options: TarOptions) -> int:
    """Index what is not indexed yet and print the summary table; return the exit code as `packing.run`."""
    console = Console(markup=False, highlight=False, emoji=False)
    work, done = out / WORK, out / "dataset.json"
    with writing_to(out):
        if done.exists():
            check_same(plan, done, done)
            console.print(f"{done} already describes these tars with these settings.", soft_wrap=True)
        else:
            work.mkdir(parents=True, exist_ok=True)
            with begin(plan, work, options.part is None):
                jobs = jobs_of(plan, root, work, load_tar, options.reject_unreadable)
                if (code := pack_part(jobs, options, out, console, "tars")) is not None:
                    return code
                finish(plan, root, out)
        shutil.rmtree(work, ignore_errors=True)
    done_plan = replace(plan, classes=read_info(out).classes, splits={"train": (), "val": ()})
    if not (damaged := damaged_tars(out)):
        return report(console, out, done_plan, options.max_reject)
    report(console, out, done_plan, 1.0)
    console.print(damaged, soft_wrap=True)
    return int(options.max_reject < 1)  # the number of lost samples is unknown: any share could be exceeded


def damaged_tars(out: Path) -> str:
    """A sentence that names the tars that end early or are damaged, "" if there are none."""
    columns = ["status", "reason", "source", "key"]
    rows = pa.Table.from_batches([read_batch(out / f"{split}.arrow", columns) for split in ("train", "val")])
    here = pc.match_substring_regex(rows["reason"], f"^({FROM_HERE}|{BAD_START})")  # pyrefly: ignore
    if not (ends := rows.filter(here).sort_by("source").to_pylist()):
        return ""
    used = rows.filter(pc.field("status") == "ok")["source"]
    names = []
    for end in ends[:SHOWN]:
        tar = end["source"].removesuffix(f"/{end['key']}")
        count = pc.sum(pc.starts_with(used, f"{tar}/")).as_py() or 0  # pyrefly: ignore
        names.append(f"{tar} from {end['key']} on ({count} samples before it are used)")
    if len(ends) > SHOWN:
        names.append(f"and {len(ends) - SHOWN} more")
    return (
        f"an unknown number of samples is lost, because these tars are damaged: {', '.join(names)}; restore "
        "them and index all tars into another folder (--out, with make: OUT=), or accept the loss with "
        "--max-reject 1 (with make: in ARGS=)."
    )


# ---- all tars --------------------------------------------------------------------------------------------


def finish(plan: PackPlan, root: Path, out: Path) -> None:
    """Decide the classes, write a catalogue per split, and dataset.json last. Raises `UserError`."""
    packing = plan.packing
    assert isinstance(packing, TarPacking)
    found = {split: read_parts(split, samples, root, out) for split, samples in plan.splits.items()}
    known = [classes_in(parts) for parts in found.values()]
    classes, labels = classes_of(known[0], known[-1], packing.class_names.splitlines())
    if not classes and not packing.unlabelled:
        tar = root / plan.splits["train"][0].source
        if other := not_read(tar):
            print(
                f"no sample has a class; {tar.name} also has {other}; if one is the class, give --class-key"
            )
    if "val" not in found:
        found = divided(found["train"], packing.val_fraction)
    counts, names = {}, {}
    tars: dict[str, list[Path]] = {}
    for split, parts in found.items():
        rows, tars[split] = joined([(pair, labelled(rows, classes, labels)) for pair, rows in parts])
        counts[split] = write_split(out / f"{split}.arrow", rows, len(tars[split]))
        names[split] = [str(tar.relative_to(out) if tar.is_relative_to(out) else tar) for tar in tars[split]]
    if "val" not in plan.splits:
        count, total = counts["val"]["samples"], sum(of["samples"] for of in counts.values())
        fraction = f"--val-fraction {packing.val_fraction:g}"
        print(f"no validation split: with {fraction}, {count} of {total} samples become it")
    write_info(replace(plan, classes=classes), out, counts, tars, {"tars": names})


def read_parts(split: str, samples: Sequence[Sample], root: Path, out: Path) -> list[Indexed]:
    """What was indexed of a split; tars with repacked samples move from the work folder to `REPACKED`."""
    parts = []
    for number, sample in enumerate(samples):
        stem = out / WORK / split / f"{number:06d}"
        rows = pq.read_table(stem.with_suffix(".parquet")).cast(SCHEMA)
        kept = out / REPACKED / split / stem.name
        if any(change.startswith(MADE) for change in rows["change"].unique().to_pylist()):
            kept.parent.mkdir(parents=True, exist_ok=True)
            for suffix in (".idx", ".tar"):
                if (written := stem.with_suffix(suffix)).exists():  # else an interrupted command moved it
                    written.replace(kept.with_suffix(suffix))
        parts.append(((root / sample.source, kept.with_suffix(".tar")), rows))
    return parts


def divided(parts: Sequence[Indexed], fraction: float) -> dict[str, list[Indexed]]:
    """Training and validation: the first four bytes of the SHA-256 of a sample's key decide."""
    found: dict[str, list[Indexed]] = {"train": [], "val": []}
    for tars, rows in parts:
        keys = rows["key"].to_pylist()
        draws = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") for key in keys]
        val = np.array(draws, np.int64) < fraction * 2**32
        found["train"].append((tars, rows.filter(pa.array(~val))))
        found["val"].append((tars, rows.filter(pa.array(val))))
    return found


def joined(parts: Sequence[Indexed]) -> tuple[pa.Table, list[Path]]:
    """The rows of a split in order, and its tars; both without tars that have no sample."""
    tables, tars = [SCHEMA.empty_table()], []
    for pair, rows in parts:
        shard, change = rows["shard"].to_numpy().copy(), rows["change"].to_pylist()
        own = np.array([text.startswith(MADE) for text in change], bool)
        for tar, here in zip(pair, ((shard >= 0) & ~own, (shard >= 0) & own), strict=True):
            if here.any():
                shard[here] = len(tars)
                tars.append(tar)
        rows = rows.set_column(SCHEMA.get_field_index("shard"), SCHEMA.field("shard"), pa.array(shard))
        tables.append(rows.take(pa.array(np.argsort(own, kind="stable"))))
    return pa.concat_tables(tables), tars


# ---- classes ---------------------------------------------------------------------------------------------


def classes_in(parts: Sequence[Indexed]) -> Classes:
    """The classes of usable samples."""
    columns = ["status", "label", "class_name", "source"]
    rows = pa.concat_tables([SCHEMA.empty_table(), *(rows for _, rows in parts)]).select(columns)
    groups = rows.filter(pc.field("status") == "ok").group_by(columns[1:3]).aggregate([("source", "min")])
    return {(row["label"], row["class_name"]): row["source_min"] for row in groups.to_pylist()}


def classes_of(train: Classes, val: Classes, listed: Sequence[str]) -> tuple[list[str], dict[int, int]]:
    """The classes in label order, and the label of each class number.

    Classes are those `listed`, else the names or numbers of the training samples; labels have no gaps.
    Raises `UserError` if numbers and names are mixed, or if validation does not agree with training.
    """
    every = val | train
    numbers = {number: source for (number, _), source in every.items() if number >= 0}
    named = {name: source for (number, name), source in every.items() if number < 0 and name}
    united = unite([*listed, *named])
    if numbers and named and not listed:
        both = f"{min(named.values())} has class {min(named)!r}, {min(numbers.values())} {min(numbers)}"
        raise UserError(
            f"{both}; give the name of each number with --class-names, or ignore all classes (--unlabelled)."
        )
    names = sorted({united[name] for number, name in train if number < 0 and name})
    used = range(len(listed)) if listed else sorted({number for number, _ in train if number >= 0})
    note_gaps(used)
    labels = {number: label for label, number in enumerate(used)}
    classes = list(listed) or names or names_of({pair for pair in train if pair[0] >= 0}, labels)
    known_names = {normalize("NFC", name) for name in classes}
    for (number, name), source in every.items():
        own = str(number) if number >= 0 else name
        unknown = number < 0 and name and normalize("NFC", name) not in known_names
        if (number >= 0 and number not in labels) or unknown:
            where = "--class-names" if listed else "training"
            raise UserError(f"{source} has class {own!r}, but {where} does not; remove it.")
        if number >= 0 and not listed and name and (known := classes[labels[number]]) not in (name, own):
            other = f"{source} calls class {number} {name!r}, training {known!r}"
            raise UserError(f"{other}; correct one of them, or give the names with --class-names.")
    return classes, labels


def names_of(pairs: set[tuple[int, str]], labels: Mapping[int, int]) -> list[str]:
    """The name of each number, if each has one of its own, otherwise the numbers. labels: of the numbers."""
    numbers = [*map(str, labels)]
    names = numbers.copy()
    for number, name in pairs:
        names[labels[number]] = name or str(number)
    return names if len(pairs) == len(numbers) and len({*names}) == len(names) else numbers


def labelled(rows: pa.Table, classes: Sequence[str], labels: Mapping[int, int]) -> pa.Table:
    """Rows with the label and name of their class; if there are classes, samples without one are rejected.

    labels: of the class numbers.
    """
    named = {normalize("NFC", name): label for label, name in enumerate(classes)}
    pairs = zip(rows["label"].to_pylist(), rows["class_name"].to_pylist(), strict=True)
    found = [labels.get(n, -1) if n >= 0 else named.get(normalize("NFC", name), -1) for n, name in pairs]
    label = np.array(found, np.int32)
    columns = {"label": label, "class_name": np.array(["", *classes], object)[label + 1]}
    for name, values in columns.items():
        rows = rows.set_column(
            SCHEMA.names.index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type)
        )
    without = (label < 0) & (rows["shard"].to_numpy() >= 0)
    if not classes or not without.any():
        return rows
    kept = [
        rejected(Sample(row["key"], -1, "", row["source"]), NO_CLASS) if none else row
        for row, none in zip(rows.to_pylist(), without.tolist(), strict=True)
    ]
    return pa.Table.from_pylist(kept, SCHEMA)
