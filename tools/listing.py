"""Turn a listing of sources into a plan for packing: splits, classes, labels, order and keys."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from unicodedata import normalize

from pipelines.errors import UserError
from tools.shards import Packing, PackPlan, Sample, make_key, readable, shuffled

# Of names that are not UTF-8. Each takes only some byte sequences, so that often one alone takes all names.
ENCODINGS = ("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "cp1252")

LeftOut = Mapping[str, tuple[int, str]]  # what was not packed: (how many, an example)


class Listed(NamedTuple):
    """One source to pack."""

    source: str  # path below the root
    label: str = ""  # the class, as the file system names it; "" without classes
    name: str = ""  # readable, for the key
    group: str = ""  # samples of one group stay in one split; "": a group of its own
    others: tuple[str, ...] = ()  # other files of the same video, read if `source` cannot be packed

    @property
    def paths(self) -> tuple[str, ...]:
        """All its files below the root."""
        return self.source, *self.others


@dataclass(frozen=True)
class Listing:
    """All sources. If `val` is None, a share of each class becomes the validation split."""

    train: Sequence[Listed]
    val: Sequence[Listed] | None = None
    left_out: LeftOut = field(default_factory=dict)
    numbered: bool = False  # classes are numbers and are sorted as such
    where: str = ""  # the lists, if there are any, for messages


def plan_of(kind: str, listing: Listing, val_fraction: float, packing: Packing, where: str) -> PackPlan:
    """Decide splits, labels, keys and order. where: names the listing in messages. Raises `UserError`."""
    train, val, where = listing.train, listing.val, listing.where or where
    if val is None:
        train, val = split_off(train, val_fraction)
        note = ""
        if val_fraction and (absent := {x.label for x in train} - {x.label for x in val} - {""}):
            note = f"; classes without a sample in it: {len(absent)}, such as {readable(min(absent))}"
        share = f"{len(val)} of {len(train) + len(val)} samples become it"
        print(f"no validation split in {where}: with --val-fraction {val_fraction:g}, {share}{note}")
    elif val and has_classes(train) != has_classes(val):
        raise UserError(
            f"{where}: only one of train and val has classes; give both or none, or name the classes of a "
            "flat val folder with --val-list."
        )
    united = unite(item.label for item in (*train, *val))
    if any(label != spelling for label, spelling in united.items()):
        train, val = ([item._replace(label=united[item.label]) for item in items] for items in (train, val))
    order = (lambda text: (int(text), text)) if listing.numbered else None
    classes = sorted({item.label for item in train} - {""}, key=order)
    if unknown := {item.label for item in val} - {*classes, ""}:
        raise UserError(f"{where}: validation has class {min(unknown)!r}, but training does not; remove it.")
    in_train = {path for item in train for path in item.paths}
    if both := in_train.intersection(path for item in val for path in item.paths):
        raise UserError(f"{where}: {min(both)!r} is in train and in val; remove it from one of them.")
    if listing.numbered:
        note_gaps([int(label) for label in classes])
    names = display_names(classes)
    numbers = {names[label]: number for number, label in enumerate(classes)}
    splits: dict[str, list[Sample]] = {"train": [], "val": []}
    for split, items in (("train", train), ("val", val)):
        ordered = sorted(items, key=lambda item: (os.fsencode(item.source), item.label, item.name))
        for index in shuffled(len(ordered)).tolist():
            item = ordered[index]
            name = names.get(item.label, "")
            key, label = make_key(index, item.name), numbers.get(name, -1)
            splits[split].append(Sample(key, label, name, item.source, item.others))
    return PackPlan(kind, [*numbers], splits, packing, listing.left_out)


def split_off(listed: Sequence[Listed], fraction: float) -> tuple[list[Listed], list[Listed]]:
    """Split a listing into train and val: the same share of each class, in a fixed random order.

    A group is in one split, also if its samples are of several classes. A class keeps at least one group in
    train.
    """
    classes: dict[str, dict[str, list[Listed]]] = {}
    for item in listed:
        classes.setdefault(item.label, {}).setdefault(item.group or min(item.paths), []).append(item)
    in_val: dict[str, bool] = {}
    for groups in classes.values():
        goal = round(fraction * sum(map(len, groups.values())))
        count = sum(len(items) for group, items in groups.items() if in_val.get(group))
        left = sum(not in_val.get(group) for group in groups)
        names = [*groups]
        for name in (names[index] for index in shuffled(len(names))):
            if name not in in_val:
                in_val[name] = count < goal and left > 1
                count, left = (count + len(groups[name]), left - 1) if in_val[name] else (count, left)
    chosen = [in_val[item.group or min(item.paths)] for item in listed]
    train = [item for item, taken in zip(listed, chosen, strict=True) if not taken]
    return train, [item for item, taken in zip(listed, chosen, strict=True) if taken]


def note_gaps(numbers: Sequence[int]) -> None:
    """Print a line if some class numbers, in ascending order, are missing: labels have no gaps."""
    first = next((n for n, number in enumerate(numbers) if number != n), None)
    if first is not None:
        print(
            f"class number {first} is missing: the {len(numbers)} numbers that occur, in their order, become "
            f"the labels 0 to {len(numbers) - 1}"
        )


def unite(labels: Iterable[str]) -> dict[str, str]:
    """The identity of each class: itself, or the composed form if it is spelled in two forms of Unicode."""
    names = {*labels}
    if any(readable(label) != label for label in names):  # in another encoding, equal forms are a coincidence
        return {label: label for label in names}
    spellings: dict[str, set[str]] = {}
    for label in names:
        spellings.setdefault(normalize("NFC", label), set()).add(label)
    several = [nfc for nfc, found in spellings.items() if len(found) > 1]
    if several:
        names = f"{readable(min(several))} ({len(several)})"
        print(f"classes that differ only in Unicode normalization (NFC, NFD) are merged, such as {names}")
    return {label: nfc if len(found) > 1 else label for nfc, found in spellings.items() for label in found}


def display_names(classes: Sequence[str]) -> dict[str, str]:
    """A distinct readable name for each class, in the same order.

    Names that are not UTF-8 are decoded with the one encoding that takes the names of all classes; if there
    is none or several, their bytes are escaped.
    """
    raw = {label: os.fsencode(label) for label in classes}
    encoding = "utf-8"
    if any(readable(label) != label for label in classes):
        fitting = [one for one in ENCODINGS if all(_decodes(name, one) for name in raw.values())]
        encoding = fitting[0] if len(fitting) == 1 else encoding
        how = f"decoded as {encoding}" if len(fitting) == 1 else "shown with escaped bytes"
        print(f"some class names are not UTF-8: they are {how}")
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in sorted(classes, key=lambda label: (readable(label) != label, label)):
        base = name = raw[label].decode(encoding, "backslashreplace")
        number = 2
        while name in taken:
            name, number = f"{base} ({number})", number + 1
        names[label] = name
        taken.add(name)
    return {label: names[label] for label in classes}


def _decodes(name: bytes, encoding: str) -> bool:
    """True if the encoding takes the name and its characters beyond ASCII are letters or digits."""
    try:
        return all(char.isascii() or char.isalnum() for char in name.decode(encoding))
    except UnicodeDecodeError:
        return False


def has_classes(listed: Iterable[Listed]) -> bool:
    return any(item.label for item in listed)
