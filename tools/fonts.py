"""Text in pictures, also in scripts that DejaVu Sans lacks: names of classes, files and runs."""

import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.files import warn_once

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

WARNED: set[str] = set()  # scripts; every line of a picture may lack other characters


def fonts_for(text: str) -> list[Path]:
    """The font files that can draw a text: DejaVu Sans, and the machine's best one for what it lacks.

    Warns of characters that no font has; they are drawn as boxes.
    """
    import matplotlib  # here: it takes half a second

    dejavu = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    lacking = frozenset(filter(str.isprintable, text)) - {*map(chr, characters(dejavu))}
    return [dejavu, *other_fonts(lacking)] if lacking else [dejavu]


@cache
def other_fonts(lacking: frozenset[str]) -> tuple[Path, ...]:
    """The font file of this machine that has most of these characters, or none if no font has any.

    Warns of the first characters of each script that no font has.
    """
    wanted, best, covered = {*map(ord, lacking)}, (), frozenset[int]()
    for path in machine_fonts():
        found = wanted & characters(path)
        if len(found) > len(covered):
            best, covered = (path,), found
    rest = sorted(map(chr, wanted - covered))
    if new := {*map(script, rest)} - WARNED:
        WARNED.update(new)
        some = " ".join([character for character in rest if script(character) in new][:8])
        warn_once(
            f"no font here has {some}: boxes are drawn; install one (Chinese in Debian: fonts-noto-cjk)"
        )
    return best


def script(character: str) -> str:
    """The first word of a character's name, such as CJK or ARABIC."""
    return unicodedata.name(character, "").partition(" ")[0]


@cache
def machine_fonts() -> list[Path]:
    """The font files of this machine, also those in the user's own folders; regular ones before bold ones."""
    from matplotlib import font_manager

    paths = map(Path, font_manager.findSystemFonts())
    return sorted(paths, key=lambda path: ("Regular" not in path.name, path))


@cache
def characters(path: Path) -> frozenset[int]:
    """The code points that a font has; none if the file cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def families(text: str) -> "FontProperties":
    """matplotlib's fonts for a text, for each of its characters the first that has it."""
    from matplotlib.font_manager import FontProperties, fontManager

    fonts = fonts_for(text)
    for path in fonts[1:]:  # matplotlib knows its own
        fontManager.addfont(path)
    return FontProperties(family=[FontProperties(fname=path).get_name() for path in fonts])


# ---- lines of text as pictures


@cache
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def parts_of(text: str, size: int) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """The text in parts that one font can draw."""
    fonts = fonts_for(text)
    found = (next((path for path in fonts if ord(letter) in characters(path)), fonts[0]) for letter in text)
    for path, part in groupby(zip(found, text, strict=True), itemgetter(0)):
        yield "".join(letter for _, letter in part), font(path, size)


def length(text: str, size: int) -> float:
    """The width of a text in pixels."""
    return sum(font.getlength(part) for part, font in parts_of(text, size))


def fitted(text: str, size: int, width: int) -> str:
    """The text, without its middle if it is wider than `width` pixels."""
    line, kept = text, min(len(text), 4 * width // size)  # no letter is narrower than a quarter of the size
    while kept > 1 and length(line, size) > width:
        line = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        kept -= 1
    return line


def line_of(text: str, size: int, color: str, width: int) -> NDArray[np.uint8]:
    """A line of text as a picture [h, width, 3] on white."""
    line, left = Image.new("RGB", (width, round(size * 1.5)), "white"), 0.0
    for part, font in parts_of(fitted(text, size, width), size):
        ImageDraw.Draw(line).text((left, size), part, color, font, anchor="ls")
        left += font.getlength(part)
    return np.asarray(line)
