"""Packs a folder of pictures into shards: ImageNet as published, class folders, or a flat folder.

    python -m tools.pack_imagenet --source data/imagenet --out shards/imagenet

`--source` holds train/<class>/* and val/<class>/*, or <class>/*, or pictures alone (unlabelled: for MAE).
Without a val folder, `--val-fraction` of the pictures (of each class) becomes the validation split. A flat
val folder, as ImageNet publishes it, gets its classes from a file: `--val-labels LOC_val_solution.csv`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from pipelines.errors import UserError, run_cli
from tools.images import SUFFIXES, Packed, prepare, read_file
from tools.packing import HERE, Flags, crew_of, label_of, run, settings, source_folder, walk
from tools.shards import Packing, Plan, readable, samples_of, shuffled
from tools.val_labels import val_classes

Listed = tuple[str, str]  # (path below the source folder, class name or "")


def load_image(root: Path, source: str, packing: Packing) -> Packed:
    """Read and check one picture. Raises `BadImage` or `OSError`."""
    return prepare(read_file(root / source), packing.short_side, packing.max_pixels)


def pack_imagenet(
    source: Path,
    out: Path,
    workers: int | None = None,
    short_side: int = 256,
    shard_size: int = 1000,
    val_fraction: float = 0.1,
    max_pixels: int = 100_000_000,
    max_reject: float = 0.01,
    val_labels: Path | None = None,
    synsets: Path | None = None,
    spread: Flags = HERE,
) -> int:
    """Pack pictures into shards; run it again after an interruption to go on.

    Args:
        source: folder with train/<class>/* and val/<class>/*, or <class>/*, or pictures alone.
        out: folder to write, for example shards/imagenet.
        workers: processes, one a core unless given; with Ray the shards under way.
        short_side: pictures whose shorter side is larger are scaled down to this.
        shard_size: pictures a shard.
        val_fraction: share of each class that becomes the validation split where the source has none.
        max_pixels: larger pictures are rejected.
        max_reject: end with exit code 1 when more than this share is rejected.
        val_labels: text file with the classes of a flat val folder: a picture's name and its class a line,
            or a class a line in the order of the names, or a class number.
        synsets: for class numbers, the class of each number a line, from 1 in the order of ILSVRC2012_ID.
        spread: over what the shards are spread.
    """
    packing = settings(short_side, shard_size, max_pixels, val_fraction, max_reject)
    crew = crew_of(workers, spread)
    source_folder(source, "--source", "the pictures")
    plan = plan_images(source, packing, val_labels, synsets)
    return run(plan, source, out, load_image, crew, max_reject)


def plan_images(
    source: Path, packing: Packing, val_labels: Path | None = None, synsets: Path | None = None
) -> Plan:
    """List the pictures below `source` and decide split, label, key and order. Raises `UserError`."""
    has_train, has_val = (source / "train").is_dir(), (source / "val").is_dir()
    if has_val and not has_train:
        raise UserError(
            f"{source} has a val folder but no train folder; to split val give --source {source}/val."
        )
    train = list_images(source, "train" if has_train else "")
    if has_val:
        val = list_images(source, "val")
    else:
        train, val = split_off(train, packing.val_fraction)
    classes = sorted({name for _, name in train if name})
    if val_labels is not None:
        if not has_val or any(name for _, name in val):
            raise UserError(f"--val-labels is for a folder {source}/val of loose pictures; leave it out.")
        paths = [path for path, _ in val]
        val = [*zip(paths, val_classes(val_labels, synsets, paths, {*classes}), strict=True)]
    elif synsets is not None:
        raise UserError("--synsets says what the numbers of --val-labels mean; give both or none.")
    if val and bool(classes) != any(name for _, name in val):
        raise UserError(
            f"only one of {source}/train and {source}/val has class folders; give both or none, or tell "
            "tools.pack_imagenet the classes of a flat val folder with --val-labels."
        )
    labels = label_of(classes, [name for _, name in val if name], str(source))
    listed = {"train": train, "val": val}
    splits = {
        split: samples_of([(path, name, Path(path).stem) for path, name in found], labels)
        for split, found in listed.items()
    }
    return Plan("image", classes, splits, packing)


def list_images(source: Path, below: str) -> list[Listed]:
    """The (path, class) of every picture in source/below, sorted; the class is its first folder's name."""
    top = source / below
    found: list[Listed] = []
    others: list[Path] = []
    for path in walk(top):
        if path.suffix.lower() in SUFFIXES:
            place = path.relative_to(top).parts
            found.append((path.relative_to(source).as_posix(), readable(place[0]) if place[1:] else ""))
        else:
            others.append(path)
    if others:
        print(f"left out {len(others)} files not named as pictures, such as {readable(str(min(others)))}")
    if not found:
        raise UserError(f"{top} holds no pictures ({' '.join(sorted(SUFFIXES))}); check --source.")
    if len({not name for _, name in found}) == 2:
        loose = min(path for path, name in found if not name)
        raise UserError(f"{top} holds both class folders and loose pictures such as {loose}; move one kind.")
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def split_off(listed: Sequence[Listed], fraction: float) -> tuple[list[Listed], list[Listed]]:
    """Split a listing into train and val: of each class the same fraction, drawn without its order."""
    by_class: dict[str, list[Listed]] = {}
    for item in listed:
        by_class.setdefault(item[1], []).append(item)
    val = {
        items[index]
        for items in by_class.values()
        for index in shuffled(len(items))[: round(fraction * len(items))]
    }
    return [item for item in listed if item not in val], [item for item in listed if item in val]


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(pack_imagenet)))
