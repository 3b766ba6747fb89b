"""The classes of ImageNet's validation pictures, which come in one flat folder and with a file of labels.

Three kinds of such files are told apart by their content: a picture's name and its class a line (Kaggle's
LOC_val_solution.csv), a class a line in the order of the names, and the devkit's class numbers in that order.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import UserError

NUMBER = re.compile(r"[0-9]{1,9}")
Line = tuple[str, str]  # where it stands, for messages, and its text


def val_classes(labels: Path, synsets: Path | None, pictures: Sequence[str], classes: set[str]) -> list[str]:
    """The class of each of `pictures`, paths in the order of their names. Raises `UserError`."""
    lines = read_lines(labels, "--val-labels")
    names = {name: path for path in pictures for name in (Path(path).stem, Path(path).name)}
    named = [(where, *_named(text)) for where, text in lines]
    numbered = bool(NUMBER.fullmatch(lines[0][1])) and lines[0][1] not in classes
    if synsets is not None and not numbered:
        raise UserError(f"--synsets is for class numbers, which {labels} does not hold; leave it out.")
    if any(name in names for _, name, _ in named[:2]):  # the first may be a heading
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
    """The lines of a text file that are not blank. Raises `UserError`."""
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
    """A line's picture and what follows it; ("", text) for a line of one word."""
    found = re.fullmatch(r"([^,\s]+)[,\s]+(.+)", text.replace('"', "").strip())
    return (Path(found[1]).name, found[2].strip()) if found else ("", text)


def _by_name(
    named: Sequence[tuple[str, str, str]], names: dict[str, str], classes: set[str]
) -> dict[str, str]:
    """The class of each picture that a line (where it stands, name, class) names."""
    found: dict[str, str] = {}
    for where, name, rest in named:
        label = rest if rest in classes else rest.split()[0]  # Kaggle's have boxes after the class
        if name not in names:
            raise UserError(f"{where}: {name or rest!r} is not a picture of val.")
        if names[name] in found:
            raise UserError(f"{where}: {name!r} has a second label.")
        if label not in classes:
            raise UserError(f"{where}: {label!r} is not a class folder of train.")
        found[names[name]] = label
    return found


def _numbered(labels: Path, lines: Sequence[Line], synsets: Path | None) -> list[Line]:
    """The lines with the classes their numbers stand for, counted from 1."""
    if synsets is None:
        raise UserError(f"{labels} holds class numbers; give --synsets FILE, the class of each a line.")
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
