"""List the pictures of a folder with their classes and splits: ImageNet, class folders, or a flat folder.

A folder holds train/<class>/* and val/<class>/*, or <class>/*, or pictures without classes (for MAE). If it
has no val folder, a share of each class becomes the validation split. ImageNet's own validation pictures are
in one flat folder; their classes come from a file of one of three kinds, which its content shows:

- a picture's name and its class per line, as Kaggle's LOC_val_solution.csv;
- a class per line, in the order of the pictures' names;
- a class number per line, as in the devkit; a second file has the class of each number.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL

from pipelines.errors import UserError
from tools.images import SUFFIXES, Packed, prepare, read_file
from tools.packing import PackOptions, label_of, walk
from tools.shards import Packing, PackPlan, readable, samples_of, shuffled

NUMBER = re.compile(r"[0-9]{1,9}")
Listed = tuple[str, str]  # (path below the source folder, class name or "")
Line = tuple[str, str]  # (file and line number for messages, text)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(PackOptions):
    """Options of packing pictures. Raises UserError for a value out of its range."""

    shard_size: int = 1000
    """pictures per shard"""
    val_fraction: float = 0.1
    """share of each class that becomes the validation split, if the source has none"""
    val_labels: Path | None = None
    """text file with the classes of a flat val folder: a picture's name and its class per line; or a class or
    a class number per line, in the order of the names"""
    synsets: Path | None = None
    """for class numbers: file with the class of each number per line, from 1 in the order of ILSVRC2012_ID"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}; it must be at least 0 and below 1.")

    def packing(self) -> Packing:
        """What decides the bytes of a shard."""
        return Packing(self.short_side, self.shard_size, self.max_pixels, self.val_fraction, PIL.__version__)


def load_image(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
    """Read and check one picture. Raises `BadImage` or `OSError`."""
    yield prepare(read_file(root / source), packing.short_side, packing.max_pixels)


def plan_images(source: Path, options: ImageOptions) -> PackPlan:
    """List the pictures below `source`; decide split, label, key and order. Raises `UserError`."""
    val_labels, synsets = options.val_labels, options.synsets
    has_train, has_val = (source / "train").is_dir(), (source / "val").is_dir()
    if has_val and not has_train:
        raise UserError(
            f"{source} has a val folder but no train folder; to split val, give --source {source}/val."
        )
    train = list_images(source, "train" if has_train else "")
    if has_val:
        val = list_images(source, "val")
    else:
        train, val = split_off(train, options.val_fraction)
    classes = sorted({name for _, name in train if name})
    if val_labels is not None:
        if not has_val or any(name for _, name in val):
            raise UserError(f"{source}/val is no folder of loose pictures; leave --val-labels out.")
        paths = [path for path, _ in val]
        val = [*zip(paths, val_classes(val_labels, synsets, paths, {*classes}), strict=True)]
    elif synsets is not None:
        raise UserError("--synsets names the class of each number in --val-labels; give both or none.")
    if val and bool(classes) != any(name for _, name in val):
        raise UserError(
            f"only one of {source}/train and {source}/val has class folders; give both or none, or name the "
            "classes of a flat val folder with --val-labels."
        )
    labels = label_of(classes, [name for _, name in val if name], str(source))
    listed = {"train": train, "val": val}
    splits = {
        split: samples_of([(path, name, Path(path).stem) for path, name in found], labels)
        for split, found in listed.items()
    }
    return PackPlan("image", classes, splits, options.packing())


def list_images(source: Path, below: str) -> list[Listed]:
    """The (path, class) of every picture in source/below, sorted; the first folder names the class."""
    top = source / below
    found: list[Listed] = []
    others: list[Path] = []
    for path in walk(top):
        if path.suffix.lower() in SUFFIXES:
            parts = path.relative_to(top).parts
            found.append((path.relative_to(source).as_posix(), readable(parts[0]) if parts[1:] else ""))
        else:
            others.append(path)
    if others:
        print(f"skipped {len(others)} files without a picture's suffix, such as {readable(str(min(others)))}")
    if not found:
        raise UserError(f"{top} holds no pictures ({' '.join(sorted(SUFFIXES))}); check --source.")
    if len({not name for _, name in found}) == 2:
        loose = min(path for path, name in found if not name)
        raise UserError(f"{top} holds both class folders and loose pictures such as {loose}; move one kind.")
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def split_off(listed: Sequence[Listed], fraction: float) -> tuple[list[Listed], list[Listed]]:
    """Split a listing into train and val: the same fraction of each class, in a fixed random order."""
    by_class: dict[str, list[Listed]] = {}
    for item in listed:
        by_class.setdefault(item[1], []).append(item)
    val = {
        items[index]
        for items in by_class.values()
        for index in shuffled(len(items))[: round(fraction * len(items))]
    }
    return [item for item in listed if item not in val], [item for item in listed if item in val]


# ---- labels of a flat validation folder --------------------------------------------------------------------


def val_classes(labels: Path, synsets: Path | None, pictures: Sequence[str], classes: set[str]) -> list[str]:
    """The classes of `pictures`, which are paths sorted by name. Raises `UserError`."""
    lines = read_lines(labels, "--val-labels")
    names = {name: path for path in pictures for name in (Path(path).stem, Path(path).name)}
    named = [(where, *_named(text)) for where, text in lines]
    numbered = bool(NUMBER.fullmatch(lines[0][1])) and lines[0][1] not in classes
    if synsets is not None and not numbered:
        raise UserError(f"{labels} has no class numbers, and --synsets is for those; leave it out.")
    if any(name in names for _, name, _ in named[:2]):  # the first line may be a heading
        found = _by_name(named if named[0][1] in names else named[1:], names, classes)
        if missing := [path for path in pictures if path not in found]:
            share = f"{len(found)} of the {len(pictures)} pictures in val"
            raise UserError(f"{labels} has labels for {share}; {missing[0]} has none.")
        return [found[path] for path in pictures]
    if len(lines) != len(pictures):
        raise UserError(f"{labels} has {len(lines)} labels for {len(pictures)} pictures in val.")
    if numbered:
        lines = _numbered(labels, lines, synsets)
    for where, text in lines:
        if text not in classes:
            raise UserError(f"{where}: {text!r} is neither a class folder of train nor a picture of val.")
    return [text for _, text in lines]


def read_lines(path: Path, flag: str) -> list[Line]:
    """The lines of a text file, without blank ones. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not a text file in UTF-8: {error}.") from error
    lines = [(f"{path} line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{flag} {path} is empty.")
    return lines


def _named(text: str) -> tuple[str, str]:
    """(picture, rest) of a line; ("", text) for a line of one word."""
    found = re.fullmatch(r"([^,\s]+)[,\s]+(.+)", text.replace('"', "").strip())
    return (Path(found[1]).name, found[2].strip()) if found else ("", text)


def _by_name(
    named: Sequence[tuple[str, str, str]], names: dict[str, str], classes: set[str]
) -> dict[str, str]:
    """The class of each picture, from lines of (file and line number, name, class)."""
    found: dict[str, str] = {}
    for where, name, rest in named:
        label = rest if rest in classes else rest.split()[0]  # in Kaggle's file, boxes follow the class
        if name not in names:
            raise UserError(f"{where}: {name or rest!r} is not a picture of val.")
        if names[name] in found:
            raise UserError(f"{where}: {name!r} has a second label.")
        if label not in classes:
            raise UserError(f"{where}: {label!r} is not a class folder of train.")
        found[names[name]] = label
    return found


def _numbered(labels: Path, lines: Sequence[Line], synsets: Path | None) -> list[Line]:
    """The lines with classes instead of class numbers, which count from 1."""
    if synsets is None:
        raise UserError(f"{labels} holds class numbers; give --synsets FILE with one class per line.")
    classes = [text.split()[0] for _, text in read_lines(synsets, "--synsets")]
    if len(classes) == 1000 and classes == sorted(classes):
        raise UserError(
            f"{synsets} is in alphabetical order; the numbers are ILSVRC2012_ID in the devkit's meta.mat, "
            "which has another order."
        )
    for where, text in lines:
        if not NUMBER.fullmatch(text) or not 1 <= int(text) <= len(classes):
            raise UserError(f"{where}: {text!r} is not a number from 1 to {len(classes)}, as {synsets} has.")
    return [(where, classes[int(text) - 1]) for where, text in lines]
