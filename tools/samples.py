"""Decide where samples and classes come from: class folders, lists, or a flat folder and a file."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from pipelines.errors import UserError
from tools.folders import PICTURES, VIDEOS, Kind, by_folder, find_sources, listed_as, stem_of
from tools.listing import Listed, Listing, has_classes
from tools.lists import (
    AFTER_FRAMES,
    NO_CLASSES,
    NUMBER,
    NUMERIC,
    Index,
    Line,
    cells_of,
    parse,
    plain_labels,
    read_text,
    source_of,
)

COLUMNS = ("label", "youtube_id", "time_start", "time_end")  # of Kinetics' annotations
CLIP_NAME = re.compile(r"(.+)_(\d+)_(\d+)", re.ASCII)  # <youtube_id>_<start>_<end>


def list_samples(
    root: Path, kind: Kind, train: Path | None, val: Path | None, synsets: Path | None
) -> Listing:
    """The samples below `root`: of class folders, or of lists. Raises `UserError`.

    train, val, synsets: see `ListOptions` and `ImageOptions` in tools/pack.py.
    """
    if synsets is not None and (val is None or train is not None):
        raise UserError("--synsets names the class of each number in a flat val folder; give --val-list too.")
    found = find_sources(root, kind)
    if train is None:
        listing = by_folder(found)
        return listing if val is None else _with_classes(listing, val, synsets, root)
    index = Index(found.sources, kind)
    listed = read_list(train, "train", index, root)
    held_out = None if val is None else read_list(val, "val", index, root)
    if held_out and has_classes(listed) and not has_classes(held_out):  # as UCF101's lists
        of_folder: dict[str, set[str]] = {}
        for item in listed:
            of_folder.setdefault(item.source.rpartition("/")[0], set()).add(item.label)
        classes = [of_folder.get(item.source.rpartition("/")[0], set()) for item in held_out]
        if all(len(names) == 1 for names in classes):
            print(f"{val}: each class is that of the same folder in {train}")
            held_out = [
                item._replace(label=min(names)) for item, names in zip(held_out, classes, strict=True)
            ]
    every = [*listed, *(held_out or ())]
    if not index.sources.intersection(item.source for item in every):
        example = root / min(item.source for item in every)
        raise UserError(f"{root} has none of the annotated clips, such as {example}; check the folder.")
    used = {path for item in every for path in item.paths}
    rest = [source for source in found.sources if source not in used]
    left_out = {**found.left_out, **({f"{kind.what} in no list": (len(rest), rest[0])} if rest else {})}
    numbers = all(NUMBER.fullmatch(item.label) for item in listed)
    where = " and ".join(str(path) for path in (train, val) if path is not None)
    return Listing(listed, held_out, left_out, numbers, where)


def read_list(path: Path, split: str, index: Index, root: Path) -> list[Listed]:
    """The samples of a split's list, in its order; print its format. Raises `UserError`."""
    text = read_text(path, f"--{split}-list")
    if any(COLUMNS[1] in cells for _, cells in cells_of(text.lstrip().partition("\n")[0], ",")):
        what, listed = "Kinetics' clips; class names", _clips_of(read_annotations(path), split, index)
    else:
        what, listed = _lines_of(path, text, split, index, root)
    absent = sum(item.source not in index.sources for item in listed)
    print(f"{path}: {len(listed)} samples; {what}" + (f"; {absent} absent" if absent else ""))
    return listed


def _lines_of(path: Path, text: str, split: str, index: Index, root: Path) -> tuple[str, list[Listed]]:
    """(format, samples) of a list with a path and a class per line. Raises `UserError`."""
    what, lines = parse(path, text, index.find)
    if not lines:
        raise UserError(
            f"--{split}-list {path}: none of its lines names one of the {index.kind.what} below {root}, such "
            f"as {what[:200]!r}; give the folder to which its paths are relative."
        )
    kind, labels = plain_labels(lines)
    if kind in (AFTER_FRAMES, NO_CLASSES) and index.kind is PICTURES:
        raise UserError(f"{path} has two numbers after each path; keep one, the class.")
    listed: list[Listed] = []
    seen: dict[str, str] = {}
    for (where, text, _), label in zip(lines, labels, strict=True):
        if not text or "\0" in text or any("\ud800" <= char < "\udc80" for char in text + label):
            raise UserError(f"{where}: {text!r} is not a path; correct it.")
        if not label and any(labels):
            raise UserError(f"{where}: {text!r} has no class, but other lines have; correct it.")
        source = source_of(where, text, index) or text.removeprefix("./").lstrip("/")
        if seen.setdefault(source, label) != label:
            raise UserError(
                f"{where}: {text!r} has a second class, {label!r}; its first is {seen[source]!r}."
            )
        listed.append(listed_as(index.kind, source, label, index.twins(source)))
    return f"{what}; {kind}", listed


# ---- Kinetics' annotations ---------------------------------------------------------------------------------


class Clip(NamedTuple):
    """One line of an annotation file."""

    label: str
    video: str
    start: int  # seconds
    end: int

    def name(self) -> str:
        """Name of its folder of frames."""
        return f"{self.video}_{self.start:06d}_{self.end:06d}"


def read_annotations(path: Path) -> list[Clip]:
    """The clips of an annotation file. Raises `UserError`."""
    (_, heading), *rows = cells_of(read_text(path, "the list"), ",") or [(1, [])]
    if missing := [name for name in COLUMNS if name not in heading]:
        raise UserError(f"{path} has no column {missing[0]!r}; its first line must name {COLUMNS}.")
    if not rows:
        raise UserError(f"{path} names no clips.")
    return [_clip(dict(zip(heading, cells, strict=False)), f"{path} line {number}") for number, cells in rows]


def _clip(row: dict[str, str], where: str) -> Clip:
    label, video, start, end = (row.get(name, "") for name in COLUMNS)
    try:
        clip = Clip(label, video, int(float(start)), int(float(end)))
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: time_start and time_end must be seconds, not {start!r} {end!r}."
        ) from error
    if {label, video} & {"", ".", ".."} or "/" in label + video:
        raise UserError(f"{where}: label {label!r} or youtube_id {video!r} cannot name a folder.")
    return clip


def _clips_of(clips: Sequence[Clip], split: str, index: Index) -> list[Listed]:
    """The clips with their sources; of several, one in the folder of the split and class is first.

    Copies of Kinetics differ in folders (by label, with underscores or blanks, by split or none), in the
    digits of the seconds, and in suffixes.
    """
    found: dict[tuple[str, int, int], list[str]] = {}
    for source in index.sources:
        if named := CLIP_NAME.fullmatch(stem_of(source).rpartition("/")[2]):
            found.setdefault((named[1], int(named[2]), int(named[3])), []).append(source)
    listed: list[Listed] = []
    for clip in clips:
        label = clip.label.replace(" ", "_")
        folders = {split, clip.label, label}
        absent = f"{label}/{clip.name()}{'.mp4' if index.kind is VIDEOS else ''}"
        sources = found.get(clip[1:], [absent])
        source, *others = sorted(sources, key=lambda path: (-len(folders & {*path.split("/")[:-1]}), path))
        listed.append(Listed(source, clip.label, clip.name(), clip.video, tuple(others)))
    return listed


# ---- classes of a flat folder ------------------------------------------------------------------------------


def _with_classes(listing: Listing, path: Path, synsets: Path | None, root: Path) -> Listing:
    """The listing with classes for its flat val folder, or for all pictures if there is no val folder."""
    flat = listing.train if listing.val is None else listing.val
    classes = None if listing.val is None else {item.label for item in listing.train}
    if has_classes(flat) if classes is None else any(item.label in classes - {""} for item in flat):
        raise UserError(f"{root}/val is not a folder of loose pictures; leave --val-list out.")
    found = flat_classes(path, synsets, [item.source for item in flat], classes)
    labelled = [item._replace(label=label) for item, label in zip(flat, found, strict=True)]
    if listing.val is not None:
        return replace(listing, val=labelled)
    print(f"{root} has no train folder: {path} names the classes of all pictures")
    return replace(listing, train=labelled, numbered=all(map(NUMBER.fullmatch, found)))


def flat_classes(
    path: Path, synsets: Path | None, pictures: Sequence[str], classes: set[str] | None
) -> list[str]:
    """The class of each picture (paths, sorted by name) of a flat folder, from a file. Raises `UserError`.

    classes: the class folders of train; None: the file decides which classes there are.
    """
    index, text = Index(pictures, PICTURES), read_text(path, "--val-list")
    what, lines = parse(path, text, index.find)
    numbered = False
    if not any(line.label for line in lines):  # no line names a picture
        rows = [(f"{path} line {n}", row.strip()) for n, row in enumerate(text.split("\n"), 1) if row.strip()]
        if len(rows) != len(pictures):
            raise UserError(
                f"{path} has {len(rows)} labels for {len(pictures)} pictures; give one per picture."
            )
        numbered = bool(NUMERIC.fullmatch(rows[0][1])) and rows[0][1] not in (classes or ())
        rows = _numbered(path, rows, synsets) if numbered else rows
        lines = [Line(where, name, label) for (where, label), name in zip(rows, pictures, strict=True)]
        what = f"a class {'number ' if numbered else ''}per line, in the order of the pictures' names"
    if synsets is not None and not numbered:
        raise UserError(f"{path} has no class numbers, and --synsets is for those; leave it out.")
    print(f"{path}: {what}")
    plain = plain_labels(lines)[1] if classes is None else [""] * len(lines)
    spelled = {normalize("NFC", label): label for label in classes or ()}
    found: dict[str, str] = {}
    for (where, name, rest), label in zip(lines, plain, strict=True):
        if classes is not None:  # in Kaggle's file, boxes follow the class
            word = (rest.split() or [""])[0]
            label = spelled.get(normalize("NFC", rest)) or spelled.get(normalize("NFC", word), "")
            if not label:
                raise UserError(f"{where}: {word!r} is not a class folder of train; correct it.")
        if not (source := source_of(where, name, index)):
            raise UserError(f"{where}: {name!r} is not a picture of val; correct it.")
        if source in found:
            raise UserError(f"{where}: {name!r} has a second label; remove one.")
        found[source] = label
    if missing := [picture for picture in pictures if not found.get(picture)]:
        share = f"{len(found)} of the {len(pictures)} pictures"
        raise UserError(f"{path} has labels for {share}; {missing[0]} has none.")
    return [found[picture] for picture in pictures]


def _numbered(path: Path, lines: Sequence[tuple[str, str]], synsets: Path | None) -> list[tuple[str, str]]:
    """The lines with classes instead of class numbers, which count from 1."""
    if synsets is None:
        raise UserError(f"{path} contains class numbers; give --synsets FILE with one class per line.")
    text = read_text(synsets, "--synsets")
    classes = [line.split()[0] for line in text.split("\n") if line.strip()]
    if len(classes) == 1000 and classes == sorted(classes):
        raise UserError(
            f"{synsets} is in alphabetical order; the numbers are ILSVRC2012_ID in the devkit's meta.mat, "
            "which has another order."
        )
    for where, text in lines:
        if not NUMBER.fullmatch(text) or not 1 <= int(text) <= len(classes):
            raise UserError(f"{where}: {text!r} is not a number from 1 to {len(classes)}, as {synsets} has.")
    return [(where, classes[int(text) - 1]) for where, text in lines]
