"""The sections of a report that compare runs: summary, numbers, curves, settings. One run is also possible.

A section takes run folders and returns what report.html shows; nothing if no run has content yet.
"""

import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from markupsafe import Markup

from models.files import read_json
from pipelines.errors import UserError
from tools.plot import COLORS, Panel, Tables, draw, names_of, panels_of
from train.config import Config, MaeConfig, flatten, to_dict
from train.evaluate import read_config
from train.finetune import most_frequent, note_of_few
from train.metrics import Row, best_of, read_csv, score
from train.optim import total_steps
from train.presets import FINETUNE_PRESETS, MAE_PRESETS
from train.rundir import exported_step

INK, PAPER = "#010203", "#040506"  # placeholders of the page's colors in matplotlib's drawings
LAST, BEST = "Last evaluation", "Best evaluation"
OPTIMISTIC = (
    "it was chosen on these samples, so quote the last evaluation, or evaluate best.safetensors on other data"
)
PRESETS: dict[str, Config] = {**MAE_PRESETS, **FINETUNE_PRESETS}
NUMBERS = {  # column -> (name, format)
    "acc": ("accuracy", "{:.1%}"),
    "acc5": ("top-5 accuracy", "{:.1%}"),
    "loss_val": ("validation loss", "{:.4g}"),
    "loss": ("training loss", "{:.4g}"),
    "loss_train": ("training loss", "{:.4g}"),
    "mfu": ("share of peak FLOP/s", "{:.1%}"),
    "max_mem_gb": ("memory", "{:.2f} GiB"),
    "skipped": ("skipped steps", "{}"),
    "bad": ("damaged samples", "{}"),
    "samples_per_s": ("speed", "{:.4g} samples/s"),
    "step_ms": ("step time", "{:.4g} ms"),
    "data_wait_ms": ("data wait", "{:.1%}"),
    "time": ("training time", "{:.1f} min"),
}
MEANINGS = {  # column without its last number -> what it is
    "acc": "Share of the evaluated samples whose most probable class is the right one.",
    "acc5": "Share of the evaluated samples whose right class is among the five most probable ones.",
    "loss_val": "Loss on the evaluated samples, without label smoothing; of an autoencoder, with fixed "
    "masks.",
    "loss": "The loss that training minimizes; mean since the previous row of metrics.csv.",
    "loss_train": "Reconstruction error that training minimizes; mean since the previous row of metrics.csv.",
    "lr": "Learning rate of the step, the highest of all parameter groups.",
    "grad_norm": "Length of the gradient of all weights before clipping. High peaks are a sign of unstable "
    "training.",
    "mfu": "Model FLOPs utilization: the model's operations per second as a share of the GPU's bf16 peak.",
    "max_mem_gb": "Highest use: of all programs on a GPU; without a GPU, of this process.",
    "skipped": "Steps that changed no weights because the gradient was not finite.",
    "bad": "Training rows in which another sample replaced a damaged one.",
    "samples_per_s": "Training samples per second of all processes, without evaluations and saving.",
    "step_ms": "Mean time of an optimizer step, without evaluations and saving.",
    "data_wait_ms": "Part of the step time that was spent waiting for data.",
    "time": "Time since training began, including evaluations.",
    "health_rank_stage": "Effective rank: in about how many directions a stage's features of the validation "
    "samples differ. Below 2, they have collapsed.",
    "health_std_stage": "How much a stage's features differ between validation samples: 0 if not at all, "
    "about 1 if they spread in all directions.",
    "health_probe": "Accuracy of a linear classifier of the last stage's features, on at most 512 "
    "validation samples.",
}


def starts_of(run: Path) -> list[dict[str, Any]]:
    """The entries of env.json, one for each start, the last one last."""
    return json.loads((run / "env.json").read_bytes())


def last_start(run: Path) -> dict[str, Any]:
    """The entry of the last start; empty if it cannot be read."""
    with suppress(Exception):  # a half-written or foreign file
        return starts_of(run)[-1]
    return {}


def summary(*runs: Path) -> dict[str, list[str]]:
    """Task, data, model, hardware and progress: a value for each run."""
    every = []
    for run in runs:
        count, most = evaluated_samples(run)
        # Of several runs, the ranking has the results.
        results = _conclusion(_rows(run), count) if len(runs) == 1 else {}
        every.append(facts(run) | results | _chance(count, most))
    return {fact: [facts.get(fact, "–") for facts in every] for fact in dict.fromkeys(chain(*every))}


def facts(run: Path) -> dict[str, str]:
    """What a run is and how far it is, as far as its files tell."""
    config, start, found = read_config(run), last_start(run), {}
    kind = "images" if config.data.frames == 1 else "clips"
    task = "pretraining (masked autoencoder)" if isinstance(config, MaeConfig) else "finetuning"
    found["Task"] = f"{task} on {kind}, from {config.model.init or 'random weights'}"
    if data := read_json(run / "data.json"):
        words = {"train": "training", "val": "validation"}
        splits = data.get("splits", {}).items()
        counts = " and ".join(f"{split['samples']:,} {words.get(name, name)}" for name, split in splits)
        found["Data"] = f"{counts} {kind}, {len(data['classes'])} classes, {config.data.path}"
    if config.data.eval_split == "train":
        found["Evaluation"] = f"accuracy is of the TRAINING {'videos' if kind == 'clips' else kind}"
    size = [config.data.frames] * (config.data.frames > 1) + [config.data.size] * 2
    millions = f"{start['parameters'] / 1e6:.1f} M parameters, " if "parameters" in start else ""
    found["Model"] = f"{config.model.name}, {millions}input {' x '.join(map(str, size))}"
    if start:
        count, device = start.get("processes", 1), f"{start.get('cpus', '?')} CPU cores"
        if start.get("gpus") and config.speed.device != "cpu":
            device = f"GPU {start['gpus'][0]}"
        found["Hardware"] = f"{device}, {count} process{'es' if count > 1 else ''}"
    return found | {"Progress": state(run)}


def state(run: Path) -> str:
    """The step of the run, or its end."""
    last, total, exported = (_rows(run) or [{}])[-1], 0, 0
    if samples := read_json(run / "data.json").get("splits", {}).get("train", {}).get("samples"):
        total = total_steps(read_config(run).optim, samples)
    with suppress(UserError):  # half-written weights are not the end
        exported = exported_step(run)
    step = last.get("step", 0)
    steps = f"{step:,}{f' of {total:,}' if step < total else ''} steps"
    minutes = f", {last['time'] / 60:.1f} min of training" if last.get("time") else ""
    # While a finished run is extended, the weights of its first end exist.
    return f"{'finished' if step and exported == step else 'not finished'}: {steps}{_epoch(last)}{minutes}"


def evaluated_samples(run: Path) -> tuple[int, int]:
    """How many samples the last evaluation had, and how many of them have the most frequent class.

    0 without a readable predictions.parquet.
    """
    with suppress(Exception):  # a half-written or foreign file
        labels = pq.read_table(run / "predictions.parquet", columns=["label"])["label"].to_numpy()
        return len(labels), most_frequent(labels)
    return 0, 0


def _chance(count: int, most: int) -> dict[str, str]:
    """The accuracy without any learning, and how coarse the accuracy of few samples is."""
    if not count:
        return {}
    level = f"{named('acc')} {most / count:.1%}: always predicting the most frequent class"
    note = note_of_few(count)
    return {"Chance level": level} | ({"Few samples": note} if note else {})


def evaluations(rows: list[dict], samples: int = 0) -> dict[str, str]:
    """The last and the best evaluation. samples: how many were evaluated, 0 if unknown."""

    def text(row: Row) -> str:
        column, right = "loss_val" if row.get("acc") is None else "acc", ""
        if samples and column == "acc":
            right = f": {score(row) * samples:,.0f} of {samples:,} samples"
        value = NUMBERS[column][1].format(abs(score(row)))
        return f"{named(column)} {value} (step {row['step']:,}{_epoch(row)}){right}"

    evaluated = [row for row in rows if best_of([row])]
    return {LAST: text(evaluated[-1]), BEST: text(best_of(evaluated))} if evaluated else {}


def _conclusion(rows: list[dict], samples: int) -> dict[str, str]:
    """`evaluations`, and which of the two to quote if the best one is better."""
    found = evaluations(rows, samples)
    scores = [score(row) for row in rows if best_of([row])]
    if scores and max(scores) > scores[-1]:
        found[BEST] += f"; {OPTIMISTIC}"
    return found


def named(column: str) -> str:
    """The name of a column that NUMBERS has, such as "accuracy (acc)"."""
    return f"{NUMBERS[column][0]} ({column})"


def meanings(columns: Sequence[str]) -> dict[str, str]:
    """What columns are; those that differ only in a last number are one entry, such as health_rank_stageN."""
    alike = {
        re.sub(r"\d+$", "", name): re.sub(r"\d+$", "N", name) for name in columns if name not in MEANINGS
    }
    shown = {name: name for name in columns if name in MEANINGS} | alike
    return {text: MEANINGS[name] for name, text in shown.items() if name in MEANINGS}


def _epoch(row: Row) -> str:
    return "" if row.get("epoch") is None else f", epoch {row['epoch']:.4g}"


def numbers(*runs: Path) -> dict[str, Any]:
    """The last value of each metric and the mean speed; for several runs the rows of a ranking.

    columns: names; rows: (place in `runs`, texts); meanings: what a name means.
    """
    tables = [_rows(run) for run in runs]
    every = [last_numbers(rows) for rows in tables]
    names = [*dict.fromkeys(chain(*every))]
    if not names:
        return {}
    if len(runs) > 1:  # acc is the last evaluation
        names = [name for name in names if name != "acc" and len({found.get(name) for found in every}) > 1]
    found = {"columns": [*map(named, names)], "meanings": {named(name): MEANINGS[name] for name in names}}
    if len(runs) == 1:
        return found | {"rows": [(0, [*every[0].values()])]}
    every = [one | evaluations(rows) for one, rows in zip(every, tables, strict=True)]
    columns = [BEST, LAST, *names]
    bests = [best_of(rows) for rows in tables]
    # Accuracies come before the losses of pretraining: the two cannot be compared.
    order = sorted(range(len(runs)), key=lambda i: (bests[i].get("acc") is None, -score(bests[i])))
    rows = [(i, [every[i].get(name, "–") for name in columns]) for i in order]
    return found | {"columns": [BEST, LAST, *found["columns"]], "rows": rows}


def last_numbers(rows: list[dict]) -> dict[str, str]:
    """Column -> text: the last value of each metric, and the mean speed."""
    last = {key: value for row in rows for key, value in row.items() if value is not None}
    if rows:
        rate, step, wait = speed_of(rows)
        speed = {"samples_per_s": rate, "step_ms": step, "data_wait_ms": wait / step}
        last |= {**speed, "time": last["time"] / 60}
    return {column: form.format(last[column]) for column, (_, form) in NUMBERS.items() if column in last}


def speed_of(rows: list[dict]) -> tuple[float, ...]:
    """Samples per second, step and data wait (ms): means over all rows except the first (warm-up)."""
    timed, names = rows[1:] or rows, ("samples_per_s", "step_ms", "data_wait_ms")
    return tuple(sum(row[name] for row in timed) / len(timed) for name in names)


def curves(*runs: Path) -> list[tuple[Markup, dict[str, str]]]:
    """A drawing for each panel of tools.plot, and what its columns mean."""
    tables = dict(zip(names_of(runs), map(_rows, runs), strict=True))
    filled = {name for rows in tables.values() for row in rows for name in row if row[name] is not None}
    return [
        (_svg(panel, tables), meanings([name for name in panel.columns if name in filled]))
        for panel in panels_of(tables)
    ]


def _svg(panel: Panel, tables: Tables) -> Markup:
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
    for number, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--run{number})")
    return Markup(svg)  # matplotlib escapes texts


def settings(*runs: Path) -> dict[str, Any]:
    """The settings that differ between the runs, then those that differ from the preset.

    columns: names of what is compared; rows: (setting, texts); others: number of settings without a row.
    """
    configs = [read_config(run) for run in runs]
    names, compared = names_of(runs), configs
    presets = {preset_of(run) for run in runs}
    if len(presets) == 1:  # runs of several presets are compared with each other only
        preset = presets.pop()
        # A run has the name of its preset, unless RUN= gives another.
        names = [
            f"preset {preset}" if preset else "the defaults",
            *(names if len(runs) > 1 else ["this run"]),
        ]
        compared = [PRESETS.get(preset, type(configs[0])()), *configs]
    tables = [{key: as_text(value) for key, value in flatten(to_dict(one)).items()} for one in compared]
    keys = dict.fromkeys(key for table in tables for key in table if key not in ("run.name", "run.root"))
    every = {key: [table.get(key, "–") for table in tables] for key in keys}
    rows = [(key, texts) for key, texts in every.items() if len({*texts}) > 1]
    rows.sort(key=lambda row: len({*row[1][-len(runs) :]}) == 1)
    return {"columns": names, "rows": rows, "others": len(keys) - len(rows)}


def preset_of(run: Path) -> str:
    """The preset in the command that started the run, empty if it is unknown."""
    words = str(last_start(run).get("command", "")).split()
    return next((word for word in words if word in PRESETS), "")


def _rows(run: Path) -> list[dict]:
    path = run / "metrics.csv"
    return read_csv(path) if path.is_file() else []


def as_text(value: object) -> str:
    """A setting as text: 10.0 as 10, a list with commas, nothing as a dash."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (", ".join(map(as_text, value)) if isinstance(value, list) else str(value)) or "–"
