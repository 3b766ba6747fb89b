"""Results of a run's last evaluation: confusion, precision, recall and F1 per class, worst samples.

They are computed from predictions.parquet, and `results_html` makes them a section of the report. A sample
without a prediction, because its probabilities are not finite, counts as wrong.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.dataset import open_split, read_info
from pipelines.errors import UserError, first_line
from train.config import from_dict
from train.rundir import is_data_of
from train.words import shown

MATRIX = 50  # classes up to which the confusion matrix is drawn
WITH_COUNTS = 20  # classes up to which its cells have numbers
PAIRS, WEAKEST, WORST = 20, 20, 24  # rows of the tables; samples shown
LABEL = 24  # characters of a class name in the matrix
THUMBNAIL = 192  # pixels
# Text has a contrast of at least 4.5 on the colours.
STYLE = """<style>
.results { --right: #9cc3ea; --wrong: #f2b8a0; }
@media (prefers-color-scheme: dark) { .results { --right: #2f5f8f; --wrong: #8a4630; } }
.results .scroll { overflow-x: auto; }
.results svg { max-width: none; font: 12px system-ui, sans-serif; fill: currentColor; }
.results td { width: 1%; white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 30rem) { .results td { padding: .2rem; } }
.results td.name { width: auto; white-space: normal; text-align: left; }
.results .samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
</style>"""


@dataclass(frozen=True)
class Results:
    """The predictions of n samples."""

    classes: list[str]  # names to show, in the order of the model's outputs
    ids: np.ndarray  # int64 [n], rows of the split
    sources: list[str]
    label: np.ndarray  # int64 [n]
    found: np.ndarray  # int64 [n], the most probable class; -1: no prediction
    chance: np.ndarray  # float [n], its probability; NaN: no prediction


@dataclass(frozen=True)
class ClassScores:
    """Scores of C classes; a share of nothing is 0."""

    samples: np.ndarray  # int64 [C]
    found: np.ndarray  # int64 [C], samples for which the class was predicted
    precision: np.ndarray  # float64 [C]
    recall: np.ndarray  # float64 [C], also the class's top-1 accuracy
    f1: np.ndarray  # float64 [C]


def read_results(run: Path) -> Results:
    """The run's predictions.parquet, with the classes of its data.json. Raises OSError or ArrowException."""
    table = pq.read_table(run / "predictions.parquet")
    classes = json.loads((run / "data.json").read_text())["classes"]
    places = {name: place for place, name in enumerate(classes)}
    return Results(
        shown(classes),
        table["id"].to_numpy(),
        table["source"].to_pylist(),
        table["label"].to_numpy().astype(np.int64),
        np.array([places.get(name, -1) for name in table["class_1"].to_pylist()], np.int64),
        table["probability_1"].to_numpy(),
    )


# ---- numbers ---------------------------------------------------------------------------------------------


def confusion(label: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """How many samples of each class (rows) got each prediction (columns), int64 [C, C]."""
    known = found >= 0
    pairs = label[known] * classes + found[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def class_scores(label: np.ndarray, found: np.ndarray, classes: int) -> ClassScores:
    """Precision, recall and F1 of every class."""
    counted = (label, found[found >= 0], label[label == found])
    samples, predicted, right = (np.bincount(part, minlength=classes) for part in counted)
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(samples, 1)
    return ClassScores(samples, predicted, precision, recall, 2 * right / np.maximum(samples + predicted, 1))


def confused(label: np.ndarray, found: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The most frequent errors: (class, predicted class, samples), at most `most`."""
    wrong = (found >= 0) & (found != label)
    pairs, counts = np.unique(np.stack([label[wrong], found[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(*pairs[:, at].tolist(), int(counts[at])) for at in order]


def worst(label: np.ndarray, found: np.ndarray, chance: np.ndarray, most: int) -> np.ndarray:
    """Places of the wrong predictions with the highest probabilities, at most `most`."""
    wrong = np.flatnonzero((found >= 0) & (found != label))
    return wrong[np.argsort(-chance[wrong], kind="stable")[:most]]


# ---- HTML ------------------------------------------------------------------------------------------------


def results_html(run: Path) -> str:
    """A fragment for the report of a run folder that has predictions.parquet; empty if that has no rows.

    Raises FileNotFoundError without that file, and OSError or ArrowException if it cannot be read.
    """
    results = read_results(run)
    if not len(results.label):
        return ""
    label, found, classes = results.label, results.found, results.classes
    scores = class_scores(label, found, len(classes))
    if len(classes) <= MATRIX:
        errors = _matrix(confusion(label, found, len(classes)), classes)
    else:
        errors = _pairs(confused(label, found, PAIRS), classes, scores)
    shown_samples = _worst_samples(run, results, worst(label, found, results.chance, WORST))
    return f'{STYLE}<div class="results">{errors}{_classes(classes, scores)}{shown_samples}</div>'


def _matrix(counts: np.ndarray, classes: Sequence[str]) -> str:
    """The confusion matrix as a drawing; the depth of a colour is the share of the row."""
    number, side = len(classes), min(48, max(14, 640 // len(classes)))
    names = [name if len(name) <= LABEL else name[: LABEL - 1] + "…" for name in classes]
    margin = 26 + 7 * max(map(len, names))
    end, center, middle = margin + number * side, margin + number * side / 2, side / 2 + 4
    heading = 'font-weight="600" text-anchor="middle"'
    parts = [f'<text x="{center}" y="14" {heading}>predicted class</text>']
    parts.append(f'<text transform="translate(14 {center}) rotate(-90)" {heading}>class</text>')
    for at, name in enumerate(names):
        place = margin + at * side + middle
        parts.append(f'<text x="{margin - 6}" y="{place}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<text transform="translate({place} {margin - 6}) rotate(-90)">{escape(name)}</text>')
    for row, column in np.argwhere(counts).tolist():
        count, samples = int(counts[row, column]), int(counts[row].sum())
        kind = "right" if row == column else "wrong"
        x, y = margin + column * side, margin + row * side
        title = f"{classes[row]}: {count} of {samples} predicted as {classes[column]}"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="var(--{kind})" '
            f'fill-opacity="{0.25 + 0.75 * count / samples:.2f}"><title>{escape(title)}</title></rect>'
        )
        if number <= WITH_COUNTS:
            at = f'x="{x + side / 2}" y="{y + middle}"'
            parts.append(f'<text {at} text-anchor="middle" pointer-events="none">{count}</text>')
    grid = f'<rect x="{margin}" y="{margin}" width="{number * side}" height="{number * side}" fill="none"'
    parts.append(f'{grid} stroke="currentColor" stroke-opacity="0.4"/>')
    size = f'viewBox="0 0 {end + 1} {end + 1}" style="width: {end + 1}px"'
    svg = f'<svg {size} role="img" aria-label="confusion matrix">{"".join(parts)}</svg>'
    note = "Rows are the classes of the samples, columns the predictions. Blue is right, red is wrong."
    return f'<h3>Confusion matrix</h3><div class="scroll" tabindex="0">{svg}</div><p class="quiet">{note}</p>'


def _pairs(pairs: list[tuple[int, int, int]], classes: Sequence[str], scores: ClassScores) -> str:
    """The table of the most confused pairs."""
    if not pairs:
        return ""
    rows = [
        ([classes[label], classes[found]], [str(count), f"{count / scores.samples[label]:.1%}"])
        for label, found, count in pairs
    ]
    return "<h3>Most confused pairs</h3>" + _table(
        ("class", "predicted as", "samples", "of the class"), rows, len(rows)
    )


def _classes(classes: Sequence[str], scores: ClassScores) -> str:
    """The table of classes, the lowest F1 first, with their mean in the first row."""
    columns = (scores.precision, scores.recall, scores.f1)
    used = np.flatnonzero(scores.samples + scores.found)
    order = used[np.argsort(scores.f1[used], kind="stable")]
    rows = [
        ([classes[at]], [str(scores.samples[at]), *(f"{column[at]:.1%}" for column in columns)])
        for at in order.tolist()
    ]
    means = [f"{column[used].mean():.1%}" for column in columns]
    rows.insert(0, ([f"mean of {len(used)} classes"], [str(scores.samples.sum()), *means]))
    return "<h3>Precision, recall and F1 per class</h3>" + _table(
        ("class", "samples", "precision", "recall", "F1"), rows, WEAKEST + 1
    )


def _table(heads: Sequence[str], rows: list[tuple[list[str], list[str]]], first: int) -> str:
    """A table of (names, numbers); a click opens the rows after the `first` ones."""
    lines = [
        "<tr>"
        + "".join(f'<td class="name">{escape(name)}</td>' for name in names)
        + "".join(f"<td>{number}</td>" for number in numbers)
        + "</tr>"
        for names, numbers in rows
    ]
    texts = len(rows[0][0])
    cells = (f'<td class="{"name quiet" if at < texts else "quiet"}">{h}</td>' for at, h in enumerate(heads))
    head = f"<tr>{''.join(cells)}</tr>"
    tables = [f"<table>{head}{''.join(part)}</table>" for part in (lines[:first], lines[first:])]
    if len(lines) <= first:
        return tables[0]
    return (
        f"{tables[0]}<details><summary>the other {len(lines) - first} classes</summary>{tables[1]}</details>"
    )


def _worst_samples(run: Path, results: Results, places: np.ndarray) -> str:
    """The worst samples with their names, and with pictures if the run's data can be read."""
    if not len(places):
        return '<p class="quiet">No sample has a wrong class.</p>'
    pictures, problem = {}, ""
    try:
        pictures = thumbnails(run, results.ids[places])
    except (OSError, UserError) as error:
        problem = f'<p class="quiet">Without pictures: {escape(first_line(error))}</p>'
    figures = ""
    for at in places.tolist():
        picture = pictures.get(int(results.ids[at]), "")
        image = picture and f'<img alt="" src="data:image/jpeg;base64,{picture}">'
        label, found = (escape(results.classes[number[at]]) for number in (results.label, results.found))
        text = f"{escape(results.sources[at])}<br>{label}, predicted as {found} ({results.chance[at]:.1%})"
        figures += f"<figure>{image}<figcaption>{text}</figcaption></figure>"
    title = "Wrong predictions with the highest probability"
    return f'<h3>{title}</h3>{problem}<div class="samples">{figures}</div>'


def thumbnails(run: Path, ids: np.ndarray) -> dict[int, str]:
    """By id, a small JPEG of each sample in base64, of a clip its middle frame; without damaged ones.

    Raises UserError unless the data of the run's settings can be read and has not changed.
    """
    from PIL import Image

    data = from_dict(json.loads((run / "config.json").read_text())).data
    info = read_info(data.path)
    if not is_data_of(run, info):
        raise UserError(f"{data.path} has changed since the run; restore it, then repeat the report")
    dataset, found = open_split(info, data.eval_split), {}
    frames = dataset.frame_counts(ids)[:, None] // 2
    for sample, jpeg in zip(ids.tolist(), dataset.read(ids, frames), strict=True):
        buffer = io.BytesIO()
        try:
            with Image.open(io.BytesIO(jpeg.tobytes())) as image:
                small = image.convert("RGB")
        except OSError:
            continue  # damaged
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(buffer, "jpeg", quality=85)
        found[sample] = base64.b64encode(buffer.getvalue()).decode()
    return found
