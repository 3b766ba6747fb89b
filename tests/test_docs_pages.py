"""README and docs/ agree with the code: messages, columns, settings, names of weights, published results."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from models.files import official_names
from models.zoo import PUBLISHED
from train.config import FIXED, FREE
from train.metrics import FINETUNE_COLUMNS, MAE_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("pipelines", "models", "train", "tools")
READMES = ("README.md", "README.zh-CN.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
MAX_LINES = 130


def section(page: str, heading: str) -> str:
    """The text below a heading of the second level."""
    _, _, rest = (ROOT / page).read_text().partition(f"\n## {heading}\n")
    return rest.partition("\n## ")[0]


def cells(text: str, column: int) -> list[str]:
    """The cells of one column of all tables in a text, without headings."""
    lines = text.splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("|---")]
    headings = {lines[i - 1] for i in tables} | {lines[i] for i in tables}
    rows = [line for line in lines if line.startswith("|") and line not in headings]
    return [re.split(r"(?<!\\)\|", row)[column + 1].strip() for row in rows]


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def assert_lists(page: str, listed: Iterable[str], known: Iterable[str]) -> None:
    """Fail with the words that a table of a page lacks, and those that it must not have or has twice."""
    found, wanted = Counter(listed), Counter(known)
    lacks, extra = sorted((wanted - found).elements()), sorted((found - wanted).elements())
    assert not lacks and not extra, f"the table in {page}: missing {lacks}, extra {extra}"


def strings_of(path: Path) -> list[str]:
    """Every string in a Python file, without the placeholders of f-strings."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_code_has_every_message_of_the_troubleshooting_page():
    files = [path for package in PRODUCT for path in (ROOT / package).glob("*.py")]
    code = "\n".join(text for path in files for text in strings_of(path))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = [code_words(cell)[0] for cell in cells(page, 0) if cell.startswith("`")]
    assert len(messages) > 50
    parts = [part.strip() for message in messages for part in message.split("...")]
    assert [part for part in parts if part not in code] == []


def test_the_table_of_metrics_has_every_column_once():
    listed = [
        name
        for cell in cells(section("docs/training.md", "What do the metrics mean?"), 0)
        for name in code_words(cell)
    ]
    assert_lists("docs/training.md", listed, {*MAE_COLUMNS, *FINETUNE_COLUMNS})


def test_the_settings_that_may_change_on_resume_are_those_of_the_code():
    table = section("docs/training.md", "Which settings may change on resume?")
    rows = dict(zip(cells(table, 1), map(code_words, cells(table, 0)), strict=True))
    free, fixed = (
        next(row for answer, row in rows.items() if answer.startswith(start)) for start in ("may", "never")
    )
    assert_lists("docs/training.md", free, (name + "*" if name.endswith(".") else name for name in FREE))
    assert_lists("docs/training.md", fixed, FIXED)


def test_the_names_of_official_weights_are_those_of_the_code():
    table = section("docs/weights.md", "What are the official weights called?")
    patterns, sizes = cells(table, 1), cells(table, 2)
    pairs = [(code_words(p)[0], size) for p, s in zip(patterns, sizes, strict=True) for size in s.split(", ")]
    listed = (pattern.replace("SIZE", size) for pattern, size in pairs)
    assert_lists("docs/weights.md", listed, official_names())


@pytest.mark.parametrize("readme", READMES)
def test_the_published_results_are_those_of_the_code(readme: str):
    row = r"^\| `([\w-]+)` \| [\d.]+ M \| ([\d.]+) \| ([\d.]*) ?\|$"
    found = re.findall(row, (ROOT / readme).read_text(), re.M)
    listed = {
        size.replace("-", "_"): (float(image), float(clip) if clip else None) for size, image, clip in found
    }
    assert listed == PUBLISHED


def test_the_options_of_packing_are_those_of_the_commands():
    table = section("docs/data.md", "Which options does packing have?")
    known = {f"tools.pack {kind}": help_of("tools.pack", kind) for kind in ("images", "clips", "all")}
    for cell, where in zip(cells(table, 0), cells(table, 3), strict=True):
        option = code_words(cell)[0].split()[0]
        for module in known if where == "all" else code_words(where):
            assert re.search(rf"{option}\b(?!-)", known[module]), (option, module)


def help_of(*command: str) -> str:
    command = [sys.executable, "-m", *command, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_is_short_and_links_every_page(readme: str):
    text = (ROOT / readme).read_text()
    assert text.count("\n") < MAX_LINES
    assert [page for page in (*PAGES, "CONTRIBUTING.md", "NOTES.md") if f"({page})" not in text] == []


@pytest.mark.parametrize("page", [*READMES, "CONTRIBUTING.md", *PAGES])
def test_links_to_headings_lead_to_headings(page: str):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", (ROOT / page).read_text()):
        text = ((ROOT / page).parent / target if target else ROOT / page).read_text()
        headings = [re.sub(r"[^\w -]", "", h.lower()) for h in re.findall(r"^#+ (.*)$", text, re.M)]
        assert anchor in [heading.replace(" ", "-") for heading in headings], (target, anchor)
