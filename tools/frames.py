"""Read a picture, or a clip that is kept as a folder of frames.

If some frames are bad, the longest run of good frames is kept. If that is less than half of the clip, the
clip is rejected.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import chain, groupby, pairwise
from pathlib import Path
from stat import S_ISDIR

from tools.clips import on_grid, part_length, parts_of
from tools.images import COPIED, SUFFIXES, TRANSIENT, BadImage, Packed, Part, mode_of, prepare, read_file
from tools.shards import ClipPacking, Packing, readable

DIFFERENT = "two numbers that count differently"
INTEGERS, DECIMALS = re.compile(r"(\d+)", re.ASCII), re.compile(r"(\d+(?:\.\d+)?)", re.ASCII)


def load_image(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
    """Read and check one picture. Raises `BadImage` or `OSError`."""
    yield prepare(read_file(root / source), packing.short_side, packing.max_pixels)


def load_clip(root: Path, source: str, packing: Packing) -> Iterator[Part]:
    """Read and check the frames of one clip; a long clip is cut. Raises `BadImage` or `OSError`."""
    assert isinstance(packing, ClipPacking)
    folder = root / source
    if not S_ISDIR(mode_of(folder)):
        raise BadImage("no frame folder")
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if not (names := [name for name in names if not name.startswith(".")]):
        raise BadImage("no frames in its folder")
    ordered, gaps = in_order(names)
    rate, fps = Fraction(packing.source_fps), Fraction(packing.fps)
    if fps < rate:
        ordered = [*on_grid(((n / rate, 1 / rate, name) for n, name in enumerate(ordered)), fps)]
    files = [folder / name for name in ordered]
    notes = ["gaps in its frame numbers closed"] if gaps else []
    if length := part_length(len(files) / fps, packing):
        bounds = [round(n * length) for n in range(round(len(files) / length) + 1)]
        parts = (
            (first, end, _or_reason(files[first:end], notes, packing)) for first, end in pairwise(bounds)
        )
        yield from parts_of(parts, packing.fps)
    else:
        yield _clip(files, notes, packing)


def _or_reason(files: Sequence[Path], notes: Sequence[str], packing: Packing) -> Part:
    """`_clip`, or the reason why it is rejected."""
    try:
        return _clip(files, notes, packing)
    except BadImage as error:
        return error


def _clip(files: Sequence[Path], notes: Sequence[str], packing: Packing) -> Packed:
    """The longest run of good frames. Raises `BadImage` or `OSError`."""
    read = [_read(path, packing) for path in files]
    first, last = longest_run([isinstance(frame, Packed) for frame in read])
    if 2 * (last - first) < len(files):
        reasons = Counter(str(frame) for frame in read if isinstance(frame, BadImage))
        raise BadImage(f"under half of its frames in a row are good: {reasons.most_common(1)[0][0]}")
    pictures = _one_size(
        files[first:last], [frame for frame in read[first:last] if isinstance(frame, Packed)], packing
    )
    changes = {picture.change for picture in pictures} - {COPIED}
    cut = ["bad frames cut off"] if last - first < len(files) else []
    change = "; ".join([*cut, *notes, *sorted(changes)]) or COPIED
    return Packed([picture.frames[0] for picture in pictures], pictures[0].size, change)


def _read(path: Path, packing: Packing) -> Part:
    try:
        return prepare(read_file(path), packing.short_side, packing.max_pixels)
    except BadImage as error:
        return error
    except OSError as error:
        if error.errno in TRANSIENT:  # the frame may be good, so it is read again
            raise
        return BadImage(f"cannot be read: {error.strerror}")


def in_order(names: Sequence[str]) -> tuple[list[str], bool]:
    """The frames of a clip in the order of the number that counts them, and whether numbers are missing.

    The names may differ in numbers only, zero-padded or not. A number counts the frames if it differs in
    every name; of several such numbers, the one with the most even steps. Numbers before it, such as the
    minutes before seconds, may not decrease. Raises `BadImage`.
    """
    names = sorted(names)
    if len(names) == 1:
        return names, False
    patterns = [[*_numbers(names, pattern)] for pattern in (DECIMALS, INTEGERS)]
    found = [*chain.from_iterable(patterns)]
    counting = [column for column in found if min(_steps(column)) > 0]
    if not counting:
        column = max(found, key=lambda column: len({number for number, _ in column}), default=[])
        pairs = ((a, b) for (one, a), (two, b) in pairwise(column) if one == two)
        raise _conflict("the same number", *next(pairs, names[:2]))
    best = min(map(_unevenness, counting))
    unclear = any(_versions(column) for column in counting if _unevenness(column) == best)
    first, *others = (
        [name for _, name in column] for column in counting if unclear or _unevenness(column) == best
    )
    for other in others:
        if other != first:
            pair = next(pair for pair in zip(first, other, strict=True) if pair[0] != pair[1])
            raise _conflict(DIFFERENT, *pair)
    for columns in patterns:
        evenness = [_unevenness(column) if min(_steps(column)) > 0 else None for column in columns]
        for column in columns[: evenness.index(best)] if best in evenness else ():
            _check_rising(column, first)
    steps = next(_steps(column) for column in counting if _unevenness(column) == best)
    return first, max(steps) >= 2 * min(steps)


def _numbers(names: Sequence[str], pattern: re.Pattern[str]) -> Iterator[list[tuple[Decimal, str]]]:
    """For each number in the names: the sorted (number, name). Raises `BadImage` if other text differs."""
    fields = [pattern.split(Path(name).stem) for name in names]  # text, number, text ...
    for name, parts in zip(names, fields, strict=True):
        if parts[::2] != fields[0][::2]:
            if pattern is INTEGERS:
                return  # 1 and 1.5 are alike as decimal numbers
            raise _conflict("names of different kinds", names[0], name)
    for column in zip(*(parts[1::2] for parts in fields), strict=True):
        yield sorted(zip(map(Decimal, column), names, strict=True))


def _check_rising(column: Sequence[tuple[Decimal, str]], order: Sequence[str]) -> None:
    """Raise `BadImage` if the numbers of a column decrease in the order of these names."""
    numbers = {name: number for number, name in column}
    for one, other in pairwise(order):
        if numbers[one] > numbers[other]:
            raise _conflict(DIFFERENT, one, other)


def _versions(column: Sequence[tuple[Decimal, str]]) -> bool:
    """True if the numbers are perhaps no decimal numbers, as in v1.9 and v1.10."""
    decimals = [str(number).partition(".")[2] for number, _ in column]
    return len({*map(len, decimals)}) > 1 and any(len(text) > 1 and text[-1] == "0" for text in decimals)


def _steps(column: Sequence[tuple[Decimal, str]]) -> list[Decimal]:
    return [b - a for (a, _), (b, _) in pairwise(column)]


def _unevenness(column: Sequence[tuple[Decimal, str]]) -> Decimal:
    """1 if all steps are equal; otherwise larger."""
    steps = _steps(column)
    return sum(steps) / (min(steps) * len(steps))


def _conflict(what: str, one: str, other: str) -> BadImage:
    return BadImage(readable(f"its frames have {what}, such as {one} and {other}"))


def longest_run(good: Sequence[bool]) -> tuple[int, int]:
    """The first longest run of True in `good`, as (start, end past it)."""
    runs = [list(run) for value, run in groupby(range(len(good)), key=good.__getitem__) if value]
    longest = max(runs, key=len, default=[])
    return (longest[0], longest[-1] + 1) if longest else (0, 0)


def _one_size(files: Sequence[Path], pictures: Sequence[Packed], packing: Packing) -> list[Packed]:
    """Resize frames of other sizes to the clip's most frequent size."""
    goal = Counter(picture.size for picture in pictures).most_common(1)[0][0]
    limits = (packing.short_side, packing.max_pixels, goal)
    return [
        picture if picture.size == goal else prepare(read_file(path), *limits)
        for path, picture in zip(files, pictures, strict=True)
    ]
