"""Write a page about one or several runs: python -m tools.report runs/A [runs/B ...] -> runs/A/report.html.

The page is one file without scripts and network access. Its end lists what the runs have not written yet.
"""

import base64
import io
import shlex
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

import tyro

from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text
from tools.compare import as_text, curves, marked, numbers, preset_of, read_json, settings, summary
from tools.plot import COLOURS, DARK_COLOURS, names_of
from tools.results import results_html
from train.config import MaeConfig, flatten, from_dict
from train.words import shown

LOG_LINES, WEAKEST = 40, 20


def report(*runs: tyro.conf.Positional[Path], out: Path | None = None) -> Path:
    """Write the page and return its path. Raises UserError if a folder is no run.

    Args:
        runs: run folders, such as runs/image-ft-pico.
        out: file to write; default: report.html in the run folder, for several runs in their parent folder.
    """
    for run in runs or [Path("runs")]:
        if not (run / "config.json").is_file():
            what = f"{run} is no run folder, it has no config.json"
            raise UserError(f"{what}; name one, as in RUN=image-mae-pico")
    body, left_out = "", []
    for title, file, make in SECTIONS:
        parts = []
        for number, group in enumerate([runs] if make in TOGETHER else [(run,) for run in runs]):
            part, missing = _part(title, [run / file for run in group], make, len(runs) > 1)
            left_out += missing
            if part and len(runs) > len(group):  # one run of several: its part can be folded
                opened = "" if title in CLOSED else " open"
                name = marked(names_of(runs)[number], number)
                part = f"<details{opened}><summary>{name}</summary>{part}</details>"
            parts.append(part)
        if html := "".join(parts):
            body += f"<section><h2>{title}</h2>{html}</section>\n"
    if left_out:
        body += f'<p class="quiet">Not in this report: {escape("; ".join(left_out))}.</p>'
    name = names_of(runs)[0] if len(runs) == 1 else f"{len(runs)} runs compared"
    values = {"name": escape(name), "time": time.strftime("%Y-%m-%d %H:%M"), "body": body}
    for mode, colours in (("light", COLOURS), ("dark", DARK_COLOURS)):
        values[mode] = " ".join(f"--run{number}: {colour};" for number, colour in enumerate(colours))
    path = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
    atomic_text(path, Template(Path(__file__).with_suffix(".html").read_text()).substitute(values))
    return path


def _part(title: str, files: list[Path], make: Callable[..., str], named: bool) -> tuple[str, list[str]]:
    """The HTML that `make` gives for these files, and what cannot be shown, with its reason."""

    def without(file: Path, why: str) -> str:
        return f"{title}{f' of {file.parent.name}' if named else ''} ({why})"

    missing = [without(file, f"there is no {file.name}") for file in files if not file.is_file()]
    if len(missing) == len(files):
        return "", missing
    try:
        html = make(*files)
    except Exception as error:  # a half-written file raises any error; the other sections are still useful
        return "", [*missing, without(files[0], f"{files[0].name} cannot be read: {error}")]
    return html, missing if html else [without(files[0], f"{files[0].name} is empty so far")]


# ---- sections of one run ----------------------------------------------------------------------------------


def reconstructions(picture: Path) -> str:
    """The picture at twice its pixels or more, one part for each sample, if its file is complete."""
    from PIL import Image

    with Image.open(picture) as image:
        image.verify()
    with Image.open(picture) as image:  # again, because verify leaves nothing to read
        # Written by train.mae; older pictures have neither.
        height, zoom = int(image.info.get("part height", image.height)), int(image.info.get("zoom", 1))
        html = ""
        for top in range(0, image.height - height + 1, height):
            buffer = io.BytesIO()
            image.crop((0, top, image.width, top + height)).save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            size = f'width="{image.width * (1 if zoom > 1 else 2)}"'
            html += f'<img {size} alt="input and reconstruction" src="data:image/png;base64,{data}">'
    return (
        f'<figure class="pictures">{html}</figure><p class="quiet">Input, visible patches, and '
        "reconstruction. The model predicts each patch relative to its mean and deviation, so true patch "
        "statistics colour the prediction.</p>"
    )


def classes(table: Path) -> str:
    """Accuracy per class, the weakest first; a click opens the others."""
    import pyarrow.parquet as pq

    every = pq.read_table(table).to_pylist()
    for row, name in zip(every, shown([row["class_name"] for row in every]), strict=True):
        row["class_name"] = name
    rows = [row for row in every if row["samples"]]
    top5 = len(every) > 5  # with at most five classes it is always 1
    lines = [
        f"<tr><th>{escape(row['class_name'])}</th><td>{row['samples']}</td>"
        f'<td style="--share: {row["accuracy"]:.0%} 100%">{row["accuracy"]:.1%}</td>'
        + (f"<td>{row['correct5'] / row['samples']:.1%}</td></tr>" if top5 else "</tr>")
        for row in sorted(rows, key=lambda row: (row["accuracy"], row["class_name"]))
    ]
    head = '<table class="classes"><tr><th>class</th><th>samples</th><th>top-1</th>'
    head += "<th>top-5</th></tr>" if top5 else "</tr>"
    first, rest = (head + "".join(part) + "</table>" for part in (lines[:WEAKEST], lines[WEAKEST:]))
    if len(lines) <= WEAKEST:
        return first if lines else ""
    return f"{first}<details><summary>the other {len(lines) - WEAKEST} classes</summary>{rest}</details>"


def usage(card: Path) -> str:
    """A command and the model card's code, both with the path of the weights."""
    run, weights = card.parent, card.with_name("model.safetensors")
    config = from_dict(read_json(run / "config.json"))
    words = ["tools.predict", run, "FILE"]
    if isinstance(config, MaeConfig):
        preset = preset_of(run).replace("-mae-", "-ft-") or "PRESET"
        words = ["train.finetune", preset, "--model.init", weights, "--data.path", config.data.path]
    command = ".venv/bin/python -m " + shlex.join(map(str, words))
    code = card.read_text().split("```python\n")[1].split("```")[0].replace(weights.name, str(weights))
    return f"<pre>{escape(command)}</pre><pre>{escape(code)}</pre>"


def environment(env: Path) -> str:
    """Versions, hardware, command and commit of the last start."""
    starts = read_json(env)
    caption = f"the last of {len(starts)} starts; env.json has all" if len(starts) > 1 else ""
    rows = flatten(starts[-1]).items()
    lines = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(as_text(value))}</td></tr>" for key, value in rows
    )
    return f'<table class="settings"><caption>{escape(caption)}</caption>{lines}</table>'


def log(path: Path) -> str:
    """The last lines of the log."""
    text = "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:])
    return text and f"<pre>{escape(text)}</pre>"


TOGETHER = (summary, numbers, curves, settings)  # the sections of all runs; the others are of one
CLOSED = ("Environment", "Log")  # of several runs, these are folded at first
SECTIONS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("Summary", "config.json", summary),
    ("Numbers", "metrics.csv", numbers),
    ("Curves", "metrics.csv", curves),
    ("Settings", "config.json", settings),
    ("Reconstructions", "reconstruction.png", reconstructions),
    ("Results", "predictions.parquet", lambda file: results_html(file.parent)),
    ("Classes", "per_class.parquet", classes),
    ("Use these weights", "model_card.md", usage),
    ("Environment", "env.json", environment),
    ("Log", "log.txt", log),
)

if __name__ == "__main__":
    run_cli(lambda: print(tyro.cli(report)))
