"""Write a page about one or several runs: python -m tools.report runs/A [runs/B ...] -> runs/A/report.html.

The page is one file without scripts and network access. Its end lists what the runs have not written yet.
This file collects the data of each section; report.html, a Jinja template, is the page.
"""

import base64
import io
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from models.files import read_json
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text
from tools.compare import as_text, curves, numbers, preset_of, settings, starts_of, summary
from tools.plot import COLORS, DARK_COLORS, names_of
from tools.results import results
from train.config import MaeConfig, flatten
from train.evaluate import read_config

LOG_LINES = 40


class Part(NamedTuple):
    """What a section shows of all runs together, or of one of several runs: the place of its name."""

    run: int | None
    data: Any


def report(*runs: tyro.conf.Positional[Path], out: Path | None = None) -> Path:
    """Write the page and return its path. Raises UserError if a folder is no run.

    Args:
        runs: run folders, such as runs/image-ft-pico.
        out: file to write; default: report.html in the run folder, for several runs in their parent folder.
    """
    for run in runs or [Path("runs")]:
        if not (run / "config.json").is_file():
            what = f"{run} is not a run folder: it has no config.json"
            raise UserError(f"{what}; name one, as in RUN=image-mae-pico")
    if out and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} does not end in .html; name such a file with OUT= (--out)")
    sections, left_out = [], []
    for title, file, make in SECTIONS:
        together = make in TOGETHER or len(runs) == 1
        parts = []
        for number, group in enumerate([runs] if together else [(run,) for run in runs]):
            data, missing = _data(title, file, make, group, len(runs) > 1)
            left_out += missing
            parts += [Part(None if together else number, data)] if data else []
        sections += [(title, parts)] if parts else []
    names = names_of(runs)
    page = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    ).get_template("report.html")
    html = page.render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs compared",
        time=time.strftime("%Y-%m-%d %H:%M"),
        names=names,
        colors={"light": COLORS, "dark": DARK_COLORS},
        sections=sections,
        left_out=left_out,
    )
    path = out or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
    atomic_text(path, html)
    return path


def _data(
    title: str, file: str, make: Callable[..., Any], runs: Sequence[Path], named: bool
) -> tuple[Any, list[str]]:
    """What `make` gives for these runs, None if nothing; and what cannot be shown, with its reason."""

    def without(why: str, run: Path | None) -> str:
        return f"{title}{f' of {run.name}' if run and named else ''} ({why})"

    missing = [without(f"there is no {file}", run) for run in runs if not (run / file).is_file()]
    if len(missing) == len(runs):
        return None, missing
    only = runs[0] if len(runs) == 1 else None
    try:
        data = make(*runs)
    except Exception as error:  # a half-written file raises any error; the other sections are still useful
        return None, [*missing, without(f"{file} cannot be read: {error}", only)]
    return data, missing if data else [without(f"{file} is empty so far", only)]


# ---- sections of one run ----------------------------------------------------------------------------------


def reconstructions(run: Path) -> dict[str, Any]:
    """Of each sample's part of reconstruction.png, if the file is complete: (width in pixels, PNG in base64).

    The width is at least twice that of the sample's pixels. normalized: whether the model predicts patches up
    to their mean and deviation.
    """
    from PIL import Image

    found = []
    with Image.open(run / "reconstruction.png") as image:
        image.verify()
    with Image.open(run / "reconstruction.png") as image:  # again, because verify leaves nothing to read
        # Written by train.mae; older pictures have neither.
        height, zoom = int(image.info.get("part height", image.height)), int(image.info.get("zoom", 1))
        for top in range(0, image.height - height + 1, height):
            buffer = io.BytesIO()
            image.crop((0, top, image.width, top + height)).save(buffer, "PNG")
            size = image.width * (1 if zoom > 1 else 2)
            found.append((size, base64.b64encode(buffer.getvalue()).decode()))
    normalized = read_json(run / "config.json").get("normalize_targets", True)  # older runs lack it
    return {"pictures": found, "normalized": normalized}


def usage(run: Path) -> tuple[str, str]:
    """A command and the model card's code, both with the path of the weights."""
    weights, config = run / "model.safetensors", read_config(run)
    words = ["tools.predict", run, "FILE"]
    if isinstance(config, MaeConfig):
        preset = preset_of(run).replace("-mae-", "-ft-") or "PRESET"
        words = ["train.finetune", preset, "--model.init", weights, "--data.path", config.data.path]
    code = (run / "model_card.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    command = ".venv/bin/python -m " + shlex.join(map(str, words))
    return command, code.replace(weights.name, str(weights))


def environment(run: Path) -> dict[str, Any]:
    """Versions, hardware, command and commit of the last start, and the number of starts."""
    starts = starts_of(run)
    rows = {key: as_text(value) for key, value in flatten(starts[-1]).items()}
    return {"starts": len(starts), "rows": rows}


def log(run: Path) -> str:
    """The last lines of the log."""
    return "\n".join((run / "log.txt").read_text(errors="replace").splitlines()[-LOG_LINES:])


TOGETHER = (summary, numbers, curves, settings)  # the sections of all runs; the others are of one
SECTIONS: tuple[tuple[str, str, Callable[..., Any]], ...] = (  # title, file that it needs, data
    ("Summary", "config.json", summary),
    ("Numbers", "metrics.csv", numbers),
    ("Curves", "metrics.csv", curves),
    ("Settings", "config.json", settings),
    ("Reconstructions", "reconstruction.png", reconstructions),
    ("Results", "predictions.parquet", results),
    ("Use these weights", "model_card.md", usage),
    ("Environment", "env.json", environment),
    ("Log", "log.txt", log),
)

if __name__ == "__main__":
    run_cli(lambda: print(tyro.cli(report)))
