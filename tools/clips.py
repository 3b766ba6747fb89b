"""Clips: frames at a constant rate, long clips cut into equal parts, clips that are folders of frames.

If some frames of a folder are bad, the longest run of good frames is kept. If that is less than half of the
clip, the clip is rejected.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import chain, groupby, pairwise
from math import floor
from pathlib import Path
from stat import S_ISDIR
from typing import TypeVar

from tools.images import COPIED, SUFFIXES, TRANSIENT, BadImage, Packed, mode_of, prepare, read_file
from tools.shards import ClipPacking, Packing, readable
from tools.sources import Part

HALF = Fraction(1, 2)
TIME_STEP = Fraction(1, 1000)  # seconds; many containers round their times to it
CUT = "part of a longer clip"

DIFFERENT = "two numbers that give different orders"
INTEGERS, DECIMALS = re.compile(r"(\d+)", re.ASCII), re.compile(r"(\d+(?:\.\d+)?)", re.ASCII)

T = TypeVar("T")


def on_grid(timed: Iterable[tuple[Fraction, Fraction, T]], fps: Fraction) -> Iterator[T]:
    """The item at each tick of `fps` per second: the last one that started, or the next if it is nearer.

    `timed`: (start, length, item) in order of start, the first at 0. An item that starts half a tick or more
    after the tick is not used. Ticks end within half a tick of the last item's end; there is at least one.
    """
    tick = 0
    half = HALF / fps
    before = None
    for start, length, item in timed:
        if before is not None:
            switch = floor((max((before[0] + start) / 2, start - half) + TIME_STEP) * fps)
            while tick <= switch:
                yield before[1]
                tick += 1
        before = start, item, start + length
    while before is not None and (tick == 0 or tick + HALF <= before[2] * fps):
        yield before[1]
        tick += 1


def part_length(seconds: Fraction, packing: ClipPacking) -> Fraction | None:
    """Frames per part of a clip of this length, not always a whole number; None if it is not cut."""
    longest, wanted = Fraction(packing.max_seconds), Fraction(packing.clip_seconds)
    parts = round(seconds / min(wanted, longest))
    return seconds * Fraction(packing.fps) / parts if seconds > longest and parts > 1 else None


def parts_of(found: Iterable[tuple[int, int, Part]], fps: float) -> Iterator[Part]:
    """Name the parts of a long clip by their times; join neighbors that are rejected.

    found: (first frame, frame past the last, part). Raises `BadImage` if no part is good.
    """
    lost: tuple[int, int, str] | None = None
    good = False
    for first, end, part in found:
        if isinstance(part, BadImage):
            lost = (lost[0], end, lost[2]) if lost else (first, end, str(part))
            continue
        if lost:
            yield BadImage(lost[2], span(lost[0], lost[1], fps))
        yield replace(part, change=f"{part.change}, {CUT}", span=span(first, end, fps))
        lost, good = None, True
    if lost and not good:
        raise BadImage(lost[2])
    if lost:
        yield BadImage(lost[2], span(lost[0], lost[1], fps))


def span(first: int, end: int, fps: float) -> str:
    """The times of frames `first` to `end` as a media fragment, in seconds."""
    return "#t=" + ",".join(f"{frame / fps:.3f}".rstrip("0").rstrip(".") for frame in (first, end))


# ---- folders of frames ------------------------------------------------------------------------------------


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
        raise BadImage(f"fewer than half of its frames in a row are good: {reasons.most_common(1)[0][0]}")
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
