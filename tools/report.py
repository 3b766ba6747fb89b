"""Write a page about a run: python -m tools.report runs/NAME -> runs/NAME/report.html.

The page is one file without scripts and network access. Its end lists what the run has not written yet.
"""

import base64
import io
import json
import re
import time
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from string import Template

import tyro

from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text
from tools.plot import Panel, Tables, draw, panels_of
from tools.results import results_html
from tools.words import shown
from train.config import flatten, from_dict
from train.metrics import best_of, read_csv, score
from train.optim import total_steps

INK = "#010203"  # placeholder of the page's text colour in matplotlib's drawings
LOG_LINES, WEAKEST = 40, 20
NUMBERS = {  # column -> (name, format)
    "acc": ("top-1", "{:.1%}"),
    "acc5": ("top-5", "{:.1%}"),
    "loss_val": ("validation loss", "{:.4g}"),
    "loss": ("training loss", "{:.4g}"),
    "loss_train": ("training loss", "{:.4g}"),
    "epoch": ("epochs", "{:.4g}"),
    "mfu": ("of peak FLOP/s", "{:.1%}"),
    "max_mem_gb": ("memory", "{:.2f} GB"),
    "skipped": ("skipped steps", "{}"),
    "bad": ("damaged samples", "{}"),
}


def report(run: tyro.conf.Positional[Path], out: Path | None = None) -> Path:
    """Write the page and return its path. Raises UserError if the folder is no run.

    Args:
        run: run folder, such as runs/image-ft-pico.
        out: file to write; default: report.html in the run folder.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run folder, it has no config.json; name one, as in RUN=image-mae-pico")
    body, left_out = "", []
    for title, file, make in SECTIONS:
        try:
            if html := make(run / file):
                body += f"<section><h2>{title}</h2>{html}</section>\n"
            else:
                left_out.append(f"{title} ({file} is empty so far)")
        except FileNotFoundError:
            left_out.append(f"{title} (there is no {file})")
        except (
            Exception
        ) as error:  # a half-written file raises any error; the other sections are still useful
            left_out.append(f"{title} ({file} cannot be read: {error})")
    if left_out:
        body += f'<p class="quiet">Not in this report: {escape("; ".join(left_out))}.</p>'
    template = Template(Path(__file__).with_suffix(".html").read_text())
    page = template.substitute(name=escape(run.resolve().name), state=escape(state(run)), body=body)
    path = out or run / "report.html"
    atomic_text(path, page)
    return path


def state(run: Path) -> str:
    """One line: the model, the kind of training, and its step or its end."""
    parts, step, steps, total = [], 0, "", 0
    try:
        config = json.loads((run / "config.json").read_text())
        parts = [str(config["model"]["name"]), str(config["kind"])]
        parts += ["accuracy is of the TRAINING videos"] * (from_dict(config).data.eval_split == "train")
        step = read_csv(run / "metrics.csv")[-1]["step"]
        samples = json.loads((run / "data.json").read_text())["splits"]["train"]["samples"]
        total = total_steps(from_dict(config).optim, samples)
        steps = f" of {total}"
    except Exception:
        pass  # as above: what was found so far is shown
    finished = (
        run / "model.safetensors"
    ).is_file() and step >= total  # the file also exists while a run is extended
    parts.append(f"finished after {step} steps" if finished else f"not finished: at step {step}{steps}")
    return f"{', '.join(parts)}, page made {time.strftime('%Y-%m-%d %H:%M')}"


# ---- sections: a file of the run -> HTML, empty if the file has no content yet ----------------------------


def numbers(metrics: Path) -> str:
    """The best evaluation, the last value of each metric, and the mean speed."""
    rows = read_csv(metrics)
    last = {key: value for row in rows for key, value in row.items() if value is not None}
    shown = {name: form.format(last[key]) for key, (name, form) in NUMBERS.items() if key in last}
    if best := best_of(rows):
        name, form = NUMBERS["loss_val" if best.get("acc") is None else "acc"]
        shown = {f"best {name}": f"{form.format(score(best)).lstrip('-')} (step {best['step']})", **shown}
    if rows:
        rate, step, wait = speed_of(rows)
        shown |= {"samples/s": f"{rate:.4g}", "step": f"{step:.4g} ms", "data wait": f"{wait / step:.1%}"}
        shown["training time"] = f"{last['time'] / 60:.1f} min"
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())
    return tiles and f'<dl class="grid numbers">{tiles}</dl>'


def speed_of(rows: list[dict]) -> tuple[float, ...]:
    """Samples per second, step and data wait (ms): means over all rows except the first (warm-up)."""
    timed, names = rows[1:] or rows, ("samples_per_s", "step_ms", "data_wait_ms")
    return tuple(sum(row[name] for row in timed) / len(timed) for name in names)


def curves(metrics: Path) -> str:
    """A drawing for each panel of tools.plot."""
    tables = {"": read_csv(metrics)}
    drawings = "".join(f"<figure>{_svg(panel, tables)}</figure>" for panel in panels_of(tables))
    return drawings and f'<div class="grid">{drawings}</div>'


def _svg(panel: Panel, tables: Tables) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    look = {"svg.fonttype": "none", "svg.hashsalt": panel[0], "legend.frameon": False}
    buffer = io.StringIO()
    with rc_context({**look, **dict.fromkeys(inks, INK)}):
        figure = Figure(figsize=(5, 3), layout="constrained")
        draw(figure.subplots(), panel, tables)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    # Every drawing has the same group names, and an id may occur only once in a page.
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).replace(INK, "currentColor")


def reconstructions(picture: Path) -> str:
    """The picture, after a check that its file is complete."""
    from PIL import Image

    with Image.open(picture) as image:
        image.verify()
    data = base64.b64encode(picture.read_bytes()).decode()
    return (
        f'<figure><img alt="inputs and reconstructions" src="data:image/png;base64,{data}"><figcaption>'
        "Input, visible patches, and reconstruction. The model predicts each patch relative to its "
        "mean and deviation, so true patch statistics colour the prediction.</figcaption></figure>"
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


def settings(config: Path) -> str:
    """All settings, one table per group."""
    groups: dict[str, dict] = {}
    for key, value in flatten(json.loads(config.read_text())).items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group or "task", {})[name] = value
    return f'<div class="grid">{"".join(_table(rows.items(), name) for name, rows in groups.items())}</div>'


def environment(env: Path) -> str:
    """Versions, hardware, command and commit of the last start."""
    starts = json.loads(env.read_text())
    caption = f"the last of {len(starts)} starts; env.json has all" if len(starts) > 1 else ""
    return _table(flatten(starts[-1]).items(), caption)


def log(path: Path) -> str:
    """The last lines of the log."""
    text = "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:])
    return text and f"<pre>{escape(text)}</pre>"


def _table(rows: Iterable[tuple[str, object]], caption: str) -> str:
    def text(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = "".join(f"<tr><th>{escape(k)}</th><td>{escape(text(v)) or '–'}</td></tr>" for k, v in rows)
    return f'<table class="settings"><caption>{escape(caption)}</caption>{lines}</table>'


SECTIONS: tuple[tuple[str, str, Callable[[Path], str]], ...] = (
    ("Numbers", "metrics.csv", numbers),
    ("Curves", "metrics.csv", curves),
    ("Reconstructions", "reconstruction.png", reconstructions),
    ("Results", "predictions.parquet", lambda file: results_html(file.parent)),
    ("Classes", "per_class.parquet", classes),
    ("Settings", "config.json", settings),
    ("Environment", "env.json", environment),
    ("Log", "log.txt", log),
)

if __name__ == "__main__":
    run_cli(lambda: print(tyro.cli(report)))
