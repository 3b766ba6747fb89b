"""Frames of a clip on a grid of constant rate, and long clips cut into equal parts."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import TypeVar

from tools.images import BadImage, Part
from tools.shards import ClipPacking

HALF = Fraction(1, 2)
TIME_STEP = Fraction(1, 1000)  # seconds; many containers round their times to it
CUT = "part of a longer clip"

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
    """Name the parts of a long clip by their times; join neighbours that are rejected.

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
