"""Results of a run's last evaluation: confusion, precision, recall and F1 per class, worst samples.

They are computed from predictions.parquet and shown by the report. A sample without a prediction, because its
probabilities are not finite, counts as wrong.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.dataset import open_split, read_info
from pipelines.errors import UserError, first_line
from train.evaluate import read_config
from train.rundir import data_of, is_data_of
from train.words import shown

MATRIX = 50  # classes up to which the confusion matrix is drawn
PAIRS, WORST = 20, 24  # the most frequent errors above that; samples shown
THUMBNAIL = 192  # pixels


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
    classes = data_of(run)["classes"]
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


# ---- the section of the report ----------------------------------------------------------------------------


def results(run: Path) -> dict[str, Any]:
    """What the report shows of predictions.parquet; empty if that has no rows.

    Raises OSError or ArrowException if the file cannot be read.
    """
    found = read_results(run)
    if not len(found.label):
        return {}
    names, count = found.classes, len(found.classes)
    scores = class_scores(found.label, found.found, count)
    columns = np.stack([scores.precision, scores.recall, scores.f1], axis=1)
    used = np.flatnonzero(scores.samples + scores.found)
    order = used[np.argsort(scores.f1[used], kind="stable")].tolist()
    small = count <= MATRIX
    return {
        "matrix": confusion(found.label, found.found, count).tolist() if small else None,
        "names": names,
        "pairs": [
            (names[label], names[other], number, number / scores.samples[label])
            for label, other, number in ([] if small else confused(found.label, found.found, PAIRS))
        ],
        "right": int((found.label == found.found).sum()),
        "total": len(found.label),
        "mean": (f"mean of {len(used)} classes", scores.samples.sum(), columns[used].mean(0)),
        "scores": [(names[at], scores.samples[at], columns[at]) for at in order],
        "worst": worst_samples(run, found),
    }


def worst_samples(run: Path, found: Results) -> dict[str, Any]:
    """The worst samples, with pictures if the run's data can be read, else with the reason."""
    places = worst(found.label, found.found, found.chance, WORST)
    pictures, problem = {}, ""
    try:
        pictures = thumbnails(run, found.ids[places])
    except (OSError, UserError, ValueError) as error:
        problem = first_line(error)
    samples = [
        {
            "source": found.sources[at],
            "label": found.classes[found.label[at]],
            "found": found.classes[found.found[at]],
            "chance": found.chance[at],
            "picture": pictures.get(int(found.ids[at])),
        }
        for at in places.tolist()
    ]
    return {"problem": problem, "samples": samples}


def thumbnails(run: Path, ids: np.ndarray) -> dict[int, str]:
    """By id, a small JPEG of each sample in base64, of a clip its middle frame; without damaged ones.

    Raises UserError unless the data of the run's settings can be read and has not changed.
    """
    from PIL import Image

    data = read_config(run).data
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
