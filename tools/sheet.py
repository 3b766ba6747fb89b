"""A sheet of pictures with captions, in sections."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WIDTH, THIN, GAP, MARGIN = 1952, 4, 16, 24  # pixels: the sheet, at least; between pictures, cards; the border
INK, QUIET = "#111111", "#555555"

Pixels = NDArray[np.uint8]


class Card(NamedTuple):
    """One row of a batch on the sheet."""

    picture: Pixels  # [h, w, 3]
    captions: Sequence[str]  # the class, the source, the view


class Section(NamedTuple):
    """A part of the sheet."""

    title: str
    lines: Sequence[str]  # what it shows
    cards: Sequence[Card]


def beside(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures of equal height from left to right."""
    gap = np.full((pictures[0].shape[0], THIN, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)


def below(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures of equal width from top to bottom."""
    return beside([picture.swapaxes(0, 1) for picture in pictures]).swapaxes(0, 1)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has few letters."""
    import matplotlib  # here: it takes half a second

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def fitted(text: str, size: int, width: int) -> str:
    """The text without its middle if it is wider than `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    kept = min(len(text), 4 * width // size)  # no letter is narrower than a quarter of the size
    while kept > 1 and font(size).getlength(without_middle(text, kept)) > width:
        kept -= 1
    return without_middle(text, kept)


def without_middle(text: str, kept: int) -> str:
    """The first and the last letters of a text, `kept` in all."""
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def sheet(title: str, about: str, sections: Sequence[Section]) -> Image.Image:
    """The picture: the cards of a section from left to right, in as many lines as they need."""
    widest = max(card.picture.shape[1] for section in sections for card in section.cards)
    right = max(WIDTH, widest + 2 * MARGIN) - MARGIN
    texts: list[tuple[int, int, str, int, str]] = []
    pictures: list[tuple[int, int, Pixels]] = []

    def write(y: int, text: str, size: int, color: str, x: int = MARGIN, width: int = right - MARGIN) -> int:
        texts.append((x, y, fitted(text, size, width), size, color))
        return y + round(size * 1.5)

    y = write(write(MARGIN, title, 26, INK), about, 16, QUIET)
    for section in sections:
        y = write(y + MARGIN, section.title, 20, INK)
        for line in section.lines:
            y = write(y, line, 15, QUIET)
        x, bottom = MARGIN, y
        for card in section.cards:
            height, width = card.picture.shape[:2]
            if x + width > right:
                x, y = MARGIN, bottom
            pictures.append((x, y + GAP, card.picture))
            under = y + GAP + height + THIN
            for number, caption in enumerate(card.captions):
                under = write(under, caption, *((15, INK) if number == 0 else (12, QUIET)), x, width)
            x, bottom = x + width + GAP, under
        y = bottom
    whole = Image.new("RGB", (right + MARGIN, y + MARGIN), "white")
    draw = ImageDraw.Draw(whole)
    for x, y, text, size, color in texts:
        draw.text((x, y), text, color, font(size))
    for x, y, picture in pictures:
        whole.paste(Image.fromarray(picture), (x, y))
    return whole
