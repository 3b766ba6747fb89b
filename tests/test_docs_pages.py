"""README and docs/ agree with the code: messages, columns, settings, names of weights, published results."""

import ast
import re
from pathlib import Path

from models.official import names
from models.zoo import PUBLISHED
from train.config import FIXED, FREE
from train.metrics import FINETUNE_COLUMNS, MAE_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PRODUCT = ("pipelines", "models", "train", "tools")
MAX_LINES = 130


def section(page: str, heading: str) -> str:
    """The text under a heading of a page, without its subsections."""
    text = (ROOT / page).read_text()
    return re.split(r"\n#+ ", text.split(f"## {heading}\n")[1])[0]


def first_cells(text: str) -> list[str]:
    """The first cell of every row of the tables in a text, without their headings."""
    rows = re.findall(r"^\| (.*?) \|", text, re.M)
    return [row for row in rows if row.startswith("`")]


def strings_of(path: Path) -> list[str]:
    """Every string in a Python file; a placeholder of an f-string becomes a NUL character."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
            found.append("".join(map(str, parts)))
    return found


def test_every_message_in_the_troubleshooting_page_is_in_the_code():
    code = "\n".join(s for package in PRODUCT for path in (ROOT / package).glob("*.py") for s in strings_of(path))
    quoted = [re.findall(r"`([^`]+)`", cell)[0] for cell in first_cells((DOCS / "troubleshooting.md").read_text())]
    assert len(quoted) > 50
    parts = [part.strip(" ") for message in quoted for part in message.split("...")]
    assert [part for part in parts if part not in code] == []


def test_the_table_of_metrics_has_every_column_once():
    cells = first_cells(section("docs/training.md", "What do the metrics mean?"))
    listed = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted({*MAE_COLUMNS, *FINETUNE_COLUMNS})


def test_the_settings_that_may_change_on_resume_are_those_of_the_code():
    rows = section("docs/training.md", "Which settings may change on resume?").splitlines()
    free, fixed = (next(re.findall(r"`([\w.*]+)`", row) for row in rows if what in row) for what in ("may change:", "never"))
    assert sorted(free) == sorted(name + "*" if name.endswith(".") else name for name in FREE)
    assert sorted(fixed) == sorted(FIXED)


def test_the_official_names_of_weights_are_those_of_the_code():
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([^|`]+) \|$", (DOCS / "weights.md").read_text(), re.M)
    listed = {name.replace("SIZE", size) for name, sizes in rows for size in sizes.split(", ")}
    assert listed == set(names())


def test_the_published_results_are_those_of_the_code():
    rows = re.findall(r"^\| `([\w-]+)` \| [\d.]+ M \| ([\d.]+) \| ([\d.]*) ?\|$", (ROOT / "README.md").read_text(), re.M)
    listed = {size.replace("-", "_"): (float(image), float(clip) if clip else None) for size, image, clip in rows}
    assert listed == PUBLISHED


def test_the_readme_is_short_and_links_every_page():
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text()
        assert text.count("\n") < MAX_LINES, readme
        pages = [f"docs/{page.name}" for page in DOCS.glob("*.md")] + ["CONTRIBUTING.md", "NOTES.md"]
        assert [page for page in pages if f"({page})" not in text] == [], readme


def test_links_to_headings_lead_to_headings():
    for page in (ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", page.read_text()):
            text = (page.parent / target).read_text() if target else page.read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.M)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, (page.name, target, anchor)
