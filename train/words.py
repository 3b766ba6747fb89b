"""Class names to show: ImageNet's synsets, such as n01440764, with their words, which timm ships."""

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SYNSET = re.compile(r"n\d{8}")
FILE = "data/_info/imagenet_synset_to_lemma.txt"  # of timm; a line is "n01440764\ttench, Tinca tinca"


def shown(classes: Sequence[str]) -> list[str]:
    """The names of classes for a reader: "tench (n01440764)" for a synset, other names unchanged."""
    words = lemmas() if any(map(SYNSET.fullmatch, classes)) else {}
    return [f"{words[name]} ({name})" if name in words else name for name in classes]


@cache
def lemmas() -> dict[str, str]:
    """The first word of every synset; empty if timm does not have the file."""
    package = find_spec("timm")  # importing it would take seconds
    path = Path(*(package.submodule_search_locations or ())[:1]) / FILE if package else Path()
    if not path.is_file():
        return {}
    lines = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {synset: text.partition(",")[0] for synset, _, text in lines}
