"""The sections of a report that compare runs: summary, results, curves, settings. One run is also possible.

A section takes the same file of each run and returns HTML, empty if no file has content yet.
"""

import io
import json
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from html import escape
from itertools import chain
from pathlib import Path

from pipelines.errors import UserError
from tools.plot import COLOURS, Panel, Tables, draw, names_of, panels_of
from train.config import Config, MaeConfig, flatten, from_dict, to_dict
from train.metrics import Row, best_of, read_csv, score
from train.optim import total_steps
from train.presets import FINETUNE_PRESETS, MAE_PRESETS
from train.rundir import exported_step

INK, PAPER = "#010203", "#040506"  # placeholders of the page's colours in matplotlib's drawings
PRESETS: dict[str, Config] = {**MAE_PRESETS, **FINETUNE_PRESETS}
NUMBERS = {  # column -> (name, format)
    "acc": ("top-1", "{:.1%}"),
    "acc5": ("top-5", "{:.1%}"),
    "loss_val": ("validation loss", "{:.4g}"),
    "loss": ("training loss", "{:.4g}"),
    "loss_train": ("training loss", "{:.4g}"),
    "mfu": ("of peak FLOP/s", "{:.1%}"),
    "max_mem_gb": ("memory", "{:.2f} GB"),
    "skipped": ("skipped steps", "{}"),
    "bad": ("damaged samples", "{}"),
}


def marked(name: str, number: int) -> str:
    """A run's name with the colour of its curves."""
    return f'<i class="chip" style="--c: var(--run{number % len(COLOURS)})"></i>{escape(name)}'


def summary(*configs: Path) -> str:
    """Task, data, model, hardware and results of the runs; what they share appears once."""
    every = [facts(path.parent) for path in configs]
    if len(every) == 1:  # of several runs, the ranking has the results
        every[0] |= results(_rows(configs[0].with_name("metrics.csv")))
    names, lines = names_of([path.parent for path in configs]), ""
    for fact in dict.fromkeys(fact for facts in every for fact in facts):
        values = [facts.get(fact, "–") for facts in every]
        text = escape(values[0])
        if len(set(values)) > 1:
            pairs = zip(names, values, strict=True)
            text = "<br>".join(f"{marked(name, i)}: {escape(v)}" for i, (name, v) in enumerate(pairs))
        lines += f"<dt>{fact}</dt><dd>{text}</dd>"
    return f'<dl class="facts">{lines}</dl>'


def facts(run: Path) -> dict[str, str]:
    """What a run is and how far it is, as far as its files tell."""
    found, start, kind, config = {}, {}, "samples", None
    with suppress(Exception):  # a run may be at any point: what can be read is shown
        config = from_dict(read_json(run / "config.json"))
        kind = "images" if config.data.frames == 1 else "clips"
        task = "pretraining (masked autoencoder)" if isinstance(config, MaeConfig) else "finetuning"
        found["Task"] = f"{task} on {kind}, from {config.model.init or 'random weights'}"
    with suppress(Exception):
        data = read_json(run / "data.json")
        words = {"train": "training", "val": "validation"}
        counts = [f"{split['samples']:,} {words.get(name, name)}" for name, split in data["splits"].items()]
        found["Data"] = f"{' and '.join(counts)} {kind}, {len(data['classes'])} classes, {config.data.path}"
    if config and config.data.eval_split == "train":
        found["Evaluation"] = f"accuracy is of the TRAINING {'videos' if kind == 'clips' else kind}"
    with suppress(Exception):
        start = read_json(run / "env.json")[-1]
    if config:
        size = [config.data.frames] * (config.data.frames > 1) + [config.data.size] * 2
        millions = f"{start['parameters'] / 1e6:.1f} M parameters, " if "parameters" in start else ""
        found["Model"] = f"{config.model.name}, {millions}input {' x '.join(map(str, size))}"
    if start:
        count, device = start.get("processes", 1), f"{start.get('cpus', '?')} CPU cores"
        if start.get("gpus") and (config is None or config.speed.device != "cpu"):
            device = f"GPU {start['gpus'][0]}"
        found["Hardware"] = f"{device}, {count} process{'es' if count > 1 else ''}"
    return found | {"Progress": state(run)}


def state(run: Path) -> str:
    """The step of the run, or its end."""
    last, total, exported = {}, 0, 0
    with suppress(Exception):
        last = _rows(run / "metrics.csv")[-1]
        samples = read_json(run / "data.json")["splits"]["train"]["samples"]
        total = total_steps(from_dict(read_json(run / "config.json")).optim, samples)
    with suppress(UserError):  # half-written weights are not the end
        exported = exported_step(run)
    step = last.get("step", 0)
    steps = f"{step:,}{f' of {total:,}' if step < total else ''} steps"
    minutes = f", {last['time'] / 60:.1f} min of training" if last.get("time") else ""
    # While a finished run is extended, the weights of its first end exist.
    return f"{'finished' if step and exported == step else 'not finished'}: {steps}{_epoch(last)}{minutes}"


def results(rows: list[dict]) -> dict[str, str]:
    """The best and the last evaluation."""

    def text(row: Row) -> str:
        name, form = NUMBERS["loss_val" if row.get("acc") is None else "acc"]
        return f"{name} {form.format(abs(score(row)))} (step {row['step']:,}{_epoch(row)})"

    evaluated = [row for row in rows if best_of([row])]
    return {"Best": text(best_of(evaluated)), "Last": text(evaluated[-1])} if evaluated else {}


def _epoch(row: Row) -> str:
    return "" if row.get("epoch") is None else f", epoch {row['epoch']:.4g}"


def numbers(*metrics: Path) -> str:
    """The last value of each metric and the mean speed: tiles, or for several runs a ranking."""
    tables = [_rows(path) for path in metrics]
    every = [last_numbers(rows) for rows in tables]
    names = dict.fromkeys(chain(*every))
    if len(tables) == 1 or not names:
        tiles = "".join(f"<div><dt>{name}</dt><dd>{every[0][name]}</dd></div>" for name in names)
        return tiles and f'<dl class="grid numbers">{tiles}</dl>'
    names.pop(NUMBERS["acc"][0], None)  # it is the last evaluation
    differ = [name for name in names if len({found.get(name) for found in every}) > 1]
    labels, bests = names_of([path.parent for path in metrics]), [best_of(rows) for rows in tables]
    # Accuracies come before the losses of pretraining: the two cannot be compared.
    order = sorted(range(len(tables)), key=lambda i: (bests[i].get("acc") is None, -score(bests[i])))
    cells = []
    for place, i in enumerate(order, start=1):
        values = every[i] | results(tables[i])
        texts = [escape(values.get(name, "–")) for name in ("Best", "Last", *differ)]
        cells.append([f"{place}. {marked(labels[i], i)}", *texts])
    note = "The best evaluation decides the order. Numbers that are equal in all runs are left out."
    return wide_table(["run", "best", "last", *differ], cells) + f'<p class="quiet">{note}</p>'


def last_numbers(rows: list[dict]) -> dict[str, str]:
    """Name -> text: the last value of each metric, and the mean speed."""
    last = {key: value for row in rows for key, value in row.items() if value is not None}
    found = {name: form.format(last[key]) for key, (name, form) in NUMBERS.items() if key in last}
    if rows:
        rate, step, wait = speed_of(rows)
        found |= {"samples/s": f"{rate:.4g}", "step": f"{step:.4g} ms", "data wait": f"{wait / step:.1%}"}
        found["training time"] = f"{last['time'] / 60:.1f} min"
    return found


def speed_of(rows: list[dict]) -> tuple[float, ...]:
    """Samples per second, step and data wait (ms): means over all rows except the first (warm-up)."""
    timed, names = rows[1:] or rows, ("samples_per_s", "step_ms", "data_wait_ms")
    return tuple(sum(row[name] for row in timed) / len(timed) for name in names)


def curves(*metrics: Path) -> str:
    """A drawing for each panel of tools.plot."""
    names = names_of([path.parent for path in metrics])
    tables = dict(zip(names, map(_rows, metrics), strict=True))
    drawings = "".join(f"<figure>{_svg(panel, tables)}</figure>" for panel in panels_of(tables))
    legend = " ".join(f"<span>{marked(name, i)}</span>" for i, name in enumerate(names))
    legend = f'<p class="legend">{legend}</p>' if len(names) > 1 else ""
    return drawings and f'{legend}<div class="grid">{drawings}</div>'


def _svg(panel: Panel, tables: Tables) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    look = {"svg.fonttype": "none", "svg.hashsalt": panel[0], "legend.edgecolor": "none"}
    buffer = io.StringIO()
    with rc_context({**look, "legend.facecolor": PAPER, **dict.fromkeys(inks, INK)}):
        figure = Figure(figsize=(4, 2.9), layout="constrained")
        draw(figure.subplots(), panel, tables)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    # Every drawing has the same group names, and an id may occur only once in a page.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).replace(INK, "currentColor")
    svg = svg.replace(PAPER, "var(--paper)")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--run{number})")
    return svg


def settings(*configs: Path) -> str:
    """The settings that differ between the runs, then those that differ from the preset."""
    runs = [from_dict(read_json(path)) for path in configs]
    tables = [{key: as_text(value) for key, value in flatten(to_dict(run)).items()} for run in runs]
    names, compared = names_of([path.parent for path in configs]), list(tables)
    presets = {preset_of(path.parent) for path in configs}
    if len(presets) == 1:  # runs of several presets are compared with each other only
        preset = presets.pop()
        values = flatten(to_dict(PRESETS.get(preset, type(runs[0])())))
        compared.insert(0, {key: as_text(value) for key, value in values.items()})
        names.insert(0, preset or "default")

    def differs(key: str, among: list[dict[str, str]]) -> bool:
        return len({table.get(key) for table in among}) > 1

    keys = [key for key in dict.fromkeys(chain(*compared)) if key not in ("run.name", "run.root")]
    shown = sorted((key for key in keys if differs(key, compared)), key=lambda key: not differs(key, tables))
    cells = [[key, *(escape(table.get(key, "–")) for table in compared)] for key in shown]
    note = f"The other {len(keys) - len(shown)} settings are equal to those of {escape(names[0])}."
    return wide_table(["setting", *map(escape, names)], cells) + f'<p class="quiet">{note}</p>'


def preset_of(run: Path) -> str:
    """The preset in the command that started the run, empty if it is unknown."""
    with suppress(Exception):
        return next(
            word for word in shlex.split(read_json(run / "env.json")[-1]["command"]) if word in PRESETS
        )
    return ""


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def _rows(metrics: Path) -> list[dict]:
    return read_csv(metrics) if metrics.is_file() else []


def as_text(value: object) -> str:
    """A setting as text: 10.0 as 10, a list with commas, nothing as a dash."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (", ".join(map(as_text, value)) if isinstance(value, list) else str(value)) or "–"


def wide_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of HTML texts that scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
