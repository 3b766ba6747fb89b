"""Read lists of samples and their classes: text, CSV and JSON files, whose format their content shows.

A line has a path or name and a class, separated by tabs, commas, semicolons or blanks, with or without a
heading. A JSON file is a list of objects, as SSv2's. The paths that exist below the folder of the samples
decide which column holds them, and where a path with blanks ends.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from posixpath import normpath
from statistics import mode
from typing import NamedTuple
from unicodedata import normalize

from pipelines.errors import UserError
from tools.folders import VIDEOS, Kind, stem_of

SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
SEPARATOR = re.compile(r"\s*[,;\t]\s*|\s+")
LABELS = ("template", "label", "class", "class_name", "classname", "category", "label_name", "tag")
NUMBER = re.compile(r"[0-9]{1,9}")
ANY_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"  # as tables write it: -1, 01, 1.0
NUMERIC = re.compile(ANY_NUMBER)
SEVERAL = re.compile(rf"{ANY_NUMBER}(?:\s+{ANY_NUMBER})+")  # such as first frame, frames, class
FRAMES_LABEL = re.compile(rf"[0-9]{{1,9}}\s+({ANY_NUMBER})")  # mmaction2's rawframes
PRETRAINING = re.compile(r"[01]\s+(?:-1|[0-9]{1,9})()")  # VideoMAE V2: first frame, number of frames or -1
BOXES = re.compile(r"(\S+)(?:\s+[0-9]+){4}(?:\s+\S+(?:\s+[0-9]+){4})*")  # Kaggle: classes with their boxes
AFTER_FRAMES = "class numbers after numbers of frames"
NO_CLASSES = "no classes, but first frames and numbers of frames"
PLAIN = ("class numbers", "class names", "no classes")
LARGEST = 10**9  # class numbers are smaller
LONGEST = 4096  # characters of a path
SAMPLED = 1000  # lines that decide the format


class Line(NamedTuple):
    """One line of a list."""

    where: str  # file and line, for messages
    path: str
    label: str  # "" if it has none


Find = Callable[[str], Sequence[str]]
JSON_START = re.compile(r'\s*(\[\s*([\[{"\]]|\d+\s*,)|\{\s*["}])')  # file names may begin with brackets too
Rows = Sequence[tuple[int, list[str]]]  # line numbers and cells


class Index:
    """Finds sources by the paths and names that lists give."""

    def __init__(self, sources: Sequence[str], kind: Kind) -> None:
        self.sources, self.kind = {*sources}, kind
        self.by_name: dict[str, list[str]] = {}
        for source in sources:
            self.by_name.setdefault(_composed(source).rpartition("/")[2], []).append(source)

    def find(self, text: str) -> list[str]:
        """Sources that a path relative to the root, an absolute path, or a name can mean.

        The suffix may be absent or differ. A path may begin above the root, or below it. It may have Windows'
        backslashes.
        """
        if text not in self.sources:
            text = re.sub(r"^[A-Za-z]:/", "/", text.replace("\\", "/"))
        text = normpath(text) if text else text  # a/./b and a//b are a/b
        if text in self.sources:
            return [text]
        stem = _composed(text).strip("/")
        found = []
        for source in self.by_name.get(stem.rpartition("/")[2], ()):
            other = _composed(source)
            above = f"/{stem}".endswith(f"/{other}") and ("/" in other or text.startswith("/"))
            if stem == other or above or other.endswith(f"/{stem}"):
                found.append(source)
        exact = [source for source in found if _composed(source) == stem] or found
        suffix = text[len(stem_of(text)) :]
        same = [source for source in exact if source.endswith(suffix)] or exact
        if len({*map(stem_of, same)}) == 1 and self.kind is VIDEOS:
            return [min(same)]
        return same

    def twins(self, source: str) -> list[str]:
        """The other files of a video: in its folder, with another suffix."""
        name = _composed(source).rpartition("/")[2]
        files = self.by_name.get(name, ()) if self.kind is VIDEOS else ()
        return [file for file in files if file != source and stem_of(file) == stem_of(source)]


def _composed(path: str) -> str:
    """A path without its suffix, in the composed form of Unicode: the files of a Mac have the other form."""
    return normalize("NFC", stem_of(path))


def source_of(where: str, text: str, index: Index) -> str:
    """The source that a list's path means; "" if there is none. Raises `UserError` if there are several."""
    found = index.find(text)
    if len(found) > 1:
        raise UserError(
            f"{where}: {text!r} can be {found[0]} or {found[1]}; give paths relative to the folder."
        )
    return found[0] if found else ""


def read_text(path: Path, flag: str) -> str:
    """The text of a file. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{flag} {path} is not a text file in UTF-8; convert it, for example with "
            f"iconv -f GB18030 -t UTF-8 {path.name} (for Chinese; for other languages, with their encoding)."
        ) from error
    if "\0" in text:
        raise UserError(f"{flag} {path} is not a text file: it contains zero bytes.")
    if not text.strip():
        raise UserError(f"{flag} {path} is empty.")
    return text


# ---- formats -----------------------------------------------------------------------------------------------


def parse(path: Path, text: str, find: Find) -> tuple[str, list[Line]]:
    """(format, lines) of a list; (its first line, []) if it names no path that `find` finds.

    Raises `UserError` if a line has another format than most lines.
    """
    if JSON_START.match(text):
        rows = _objects(path, text)
        column, share, _ = _path_column(rows, find)
        return _table(path, rows, column, "", find) if share else (" ".join(rows[1][1]), [])
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    sample = _sample(lines)
    best, table = (sum(bool(_ends(line, find)) for _, line in sample) / len(sample), 1), None
    for separator in (one for one in SEPARATORS if one in text):
        rows = cells_of(text, separator)
        column, share, same_width = _path_column(rows, find)
        if share and (share, 2 * same_width) > best:
            best, table = (share, 2 * same_width), (rows, column, separator)
    if best[0] == 0:
        return lines[0][1], []
    return _table(path, *table, find) if table else _lines(path, lines, find)


def _sample(lines: Sequence) -> Sequence:
    """About SAMPLED lines, evenly spaced."""
    return lines[:: max(1, len(lines) // SAMPLED)]


def _objects(path: Path, text: str) -> Rows:
    """The objects of a JSON file as a table with a heading. Raises `UserError`."""
    try:
        objects = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(objects, list) or not objects or not all(isinstance(item, dict) for item in objects):
        raise UserError(f"{path} is not a list of objects; of SSv2, give train.json or validation.json.")
    names = [*dict.fromkeys(name for item in objects[:SAMPLED] for name in item)]
    rows = [[item.get(name) for name in names] for item in objects]
    texts = ([str(x) if isinstance(x, str | int | float) and x == x else "" for x in row] for row in rows)
    return [*enumerate([names, *texts])]


def cells_of(text: str, separator: str) -> Rows:
    """The rows of a text as a table; [] if it has one column."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        rows = [
            (reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))
        ]
    except csv.Error:
        return []
    return rows if any(len(cells) > 1 for _, cells in rows) else []


def _path_column(rows: Rows, find: Find) -> tuple[int, float, bool]:
    """The column with the most existing paths, their share of the rows, and if all rows are equally long."""
    sample = [cells for _, cells in _sample(rows)]
    found = [sum(bool(find(cells[n])) for cells in sample if n < len(cells)) for n in range(_width(rows))]
    most = max(found, default=0)
    same_width = len({len(cells) for _, cells in rows}) == 1
    return found.index(most) if most else 0, most / max(1, len(sample)), same_width


def _width(rows: Rows) -> int:
    """The number of cells that most rows have."""
    return mode(len(cells) for _, cells in rows) if rows else 0


def _table(path: Path, rows: Rows, column: int, separator: str, find: Find) -> tuple[str, list[Line]]:
    """The lines of a table whose `column` holds the paths; without a separator it comes from JSON."""
    (_, first), width = rows[0], _width(rows)
    for number, cells in rows if separator else ():
        if len(cells) != width:
            raise UserError(
                f"{path} line {number} has {len(cells)} columns, most lines have {width}; correct it."
            )
        if any("\n" in cell for cell in cells):
            raise UserError(
                f"{path} has a quoted cell of several lines that ends in line {number}; close its quote."
            )
    seen = [{cells[n] for _, cells in rows[1:] if n < len(cells)} for n in range(len(first))]
    new = not any(cell in cells for cell, cells in zip(first, seen, strict=True))
    heading = not separator or (len(rows) > 1 and new and not find(first[column]) and _are_words(first))
    others = [n for n in range(width) if n != column]
    if heading and (len(others) > 1 or not separator):
        named = {name.lower(): n for n, name in enumerate(first) if n != column}
        others = [named[name] for name in LABELS if name in named][:1]
        if not others and separator:
            columns = ", ".join(first)
            raise UserError(f"{path}: one of its columns {columns} is the class; name that column label.")
    lines = []
    for number, cells in rows[heading:]:
        where = f"{path} {'line' if separator else 'entry'} {number}"
        lines.append(Line(where, cells[column], " ".join(cells[n] for n in others)))
    if not heading and len(others) > 1 and plain_labels(lines)[0] in PLAIN:
        raise UserError(f"{path} has {width} columns and no header; keep two, the path and the class.")
    if others and first[others[0]] == "template":  # SSv2: [something] is something in its list of classes
        lines = [line._replace(label=re.sub(r"[\[\]]", "", line.label)) for line in lines]
    names = ", ".join(first[n] for n in (column, *others)) if heading else "path, class"
    return f"{names} {f'separated by {SEPARATORS[separator]}' if separator else 'in JSON'}", lines


def _are_words(cells: Sequence[str]) -> bool:
    """True if no cell is a number or a path, as in a heading."""
    return not any(NUMERIC.fullmatch(cell) or "/" in cell or stem_of(cell) != cell for cell in cells)


def _ends(line: str, find: Find) -> list[tuple[str, str]]:
    """(path, rest) for each separator at which a path that exists ends; the end of the line is one, too."""
    return [(path, rest) for path, rest in [*_splits(line), (line, "")] if path and find(path)]


def _splits(line: str) -> Iterator[tuple[str, str]]:
    """The line before and after each separator."""
    found = SEPARATOR.finditer(line[:LONGEST])
    return ((line[: separator.start()], line[separator.end() :]) for separator in found)


def _lines(path: Path, lines: Sequence[tuple[int, str]], find: Find) -> tuple[str, list[Line]]:
    """The lines of a list that begin with a path. Raises `UserError`."""
    parsed: list[Line] = []
    absent: list[int] = []
    for number, text in lines:
        where, ends = f"{path} line {number}", _ends(text, find)
        ends = [end for end in ends if stem_of(end[0]) != end[0]] or ends  # a path with a suffix ends there
        if len(ends) > 1:
            both = f"{ends[0][0]!r} and {ends[1][0]!r}"
            raise UserError(f"{where} is ambiguous: {both} exist; write it in quotes, with a comma.")
        absent += [] if ends else [len(parsed)]
        parsed.append(Line(where, *ends[0]) if ends else Line(where, text, ""))
    known = {line.label for n, line in enumerate(parsed) if n not in {*absent}}
    for n in absent:
        parsed[n] = _absent(parsed[n], known)
    first, heading = parsed[0], ""
    if absent[:1] == [0] and first.label not in known and _are_words([first.path, first.label]):
        parsed, heading = parsed[1:], " after a header"
    what = "a path per line" if known == {""} else "path and class per line"
    return what + heading, parsed


def _absent(line: Line, known: set[str]) -> Line:
    """A line with a path that does not exist, split where the other lines let expect."""
    where, text, _ = line
    if known == {""}:
        return line
    ends = [*_splits(text)]
    suffixed = [end for end in ends if stem_of(end[0]) != end[0]]
    frames = ends[-2:-1] if all(map(FRAMES_LABEL.fullmatch, known)) else []
    best = [*suffixed, *frames, *(end for end in ends if end[1] in known), *ends[-1:]]
    if not best:
        raise UserError(f"{where}: {text!r} has no path and class like the other lines; correct it.")
    return Line(where, *best[0])


def plain_labels(lines: Sequence[Line]) -> tuple[str, list[str]]:
    """What the classes of a list are, and the classes without numbers of frames and boxes.

    Numbers are whole numbers, in whatever form. Raises `UserError` for another number, such as -1.
    """
    labels, what = [line.label for line in lines], ""
    forms = {NO_CLASSES: PRETRAINING, AFTER_FRAMES: FRAMES_LABEL, "classes before boxes": BOXES}
    for kind, form in forms.items():
        found = [one[1] for one in map(form.fullmatch, labels) if one]
        if len(found) == len(labels):
            labels, what = found, kind
            break
    if not what and labels and all(map(SEVERAL.fullmatch, labels)):
        raise UserError(f"{lines[0].where}: {labels[0]!r} is not a class; keep one number, the class.")
    numbers = all(map(NUMERIC.fullmatch, labels))
    for n, label in enumerate(labels):
        if NUMERIC.fullmatch(label) and (numbers or not NUMBER.fullmatch(label)):
            labels[n] = _class_number(lines[n].where, label, numbers)
    return what or (PLAIN[0] if numbers else PLAIN[1] if any(labels) else PLAIN[2]), labels


def _class_number(where: str, label: str, numbers: bool) -> str:
    """A class number as a whole number. Raises `UserError`.

    numbers: all classes of the list are numbers.
    """
    value = Decimal(label)
    if numbers and 0 <= value < LARGEST and value == int(value):
        return str(int(value))
    raise UserError(
        f"{where}: {label!r} is not a class; write classes as 0, 1, 2 ... or as names, and remove the lines "
        "of samples without a class."
    )
