"""Scores of a run's predictions, and their section of the report."""

import base64
import io
import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.dataset import open_dataset
from tests.train_helpers import small
from tools.report import report
from tools.results import class_scores, confused, confusion, read_results, worst
from train.config import to_dict
from train.finetune import write_predictions

LABEL = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
FOUND = np.array([0, 0, 1, -1, 1, 0, 0, 2, 2, 1])  # one of class 0 has no prediction
EVIL = "<script>alert(1)</script>"


def write_run(run: Path, data: Path, classes: list[str], best: np.ndarray, chances: np.ndarray) -> Path:
    """The folder of a run on `data` with these predictions for its validation samples."""
    run.mkdir()
    config = small("image-ft-pico", data, run.parent, run.name)
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    dataset = open_dataset(data, "val")
    digests = json.loads((data / "dataset.json").read_text())["catalogue_sha256"]
    (run / "data.json").write_text(json.dumps({"classes": classes, "sha256": digests}))
    dataset = replace(dataset, info=replace(dataset.info, classes=tuple(classes)))
    write_predictions(run, dataset, np.arange(len(dataset)), best, chances)
    return run


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.S)).split())


def page_of(run: Path) -> str:
    """The report's section of the results."""
    return report(run).read_text().split("<h2>Results</h2>")[1].split("</section>")[0]


def test_scores_equal_those_computed_by_hand():
    assert confusion(LABEL, FOUND, 4).tolist() == [[2, 1, 0, 0], [2, 1, 0, 0], [0, 1, 2, 0], [0] * 4]
    scores = class_scores(LABEL, FOUND, 4)
    assert scores.samples.tolist() == [4, 3, 3, 0] and scores.found.tolist() == [4, 3, 2, 0]
    assert scores.precision.tolist() == pytest.approx([2 / 4, 1 / 3, 1, 0])
    assert scores.recall.tolist() == pytest.approx([2 / 4, 1 / 3, 2 / 3, 0])
    assert scores.f1.tolist() == pytest.approx([0.5, 1 / 3, 0.8, 0])
    for mine, p, r in zip(scores.f1[:3], scores.precision, scores.recall, strict=False):
        assert mine == pytest.approx(2 * p * r / (p + r)), "the harmonic mean"
    assert confused(LABEL, FOUND, 2) == [(1, 0, 2), (0, 1, 1)]
    assert confused(LABEL, LABEL, 5) == []
    chance = np.linspace(0.1, 1, 10)
    assert worst(LABEL, FOUND, chance, 3).tolist() == [9, 6, 5], "sample 3 has no prediction"


@pytest.fixture(scope="module")
def wrong(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 7 pictures of each class, the last one is wrong; the first of all has no prediction."""
    label = open_dataset(images, "val").label
    best = np.stack([label, 1 - label], axis=1)
    last = [int(np.flatnonzero(label == one)[-1]) for one in (0, 1)]
    best[last] = best[last, ::-1]
    best[0] = -1
    chances = np.tile(np.float32([0.8, 0.2]), (14, 1))
    chances[last[1]] = [0.97, 0.03]
    folder = tmp_path_factory.mktemp("results") / "run"
    return write_run(folder, images, [f"cat {EVIL}", "n01440764"], best, chances)


def test_the_report_shows_the_matrix_the_classes_and_the_worst_samples(wrong: Path):
    page = page_of(wrong)
    results = read_results(wrong)
    assert results.classes == [f"cat {EVIL}", "tench (n01440764)"] and results.found[0] == -1
    assert "<script" not in page and "cat <script>alert(1)</s…" in unescape(page)
    titles = re.findall(r'--share: ([\d.]+)" title="(.*?)">', page)
    first = int(results.label[0])
    names = results.classes[first], results.classes[1 - first]
    assert {unescape(title): float(depth) for depth, title in titles} == {
        f"{names[0]}: 5 of 6 predicted as {names[0]}": 0.88,
        f"{names[0]}: 1 of 6 predicted as {names[1]}": 0.38,
        f"{names[1]}: 1 of 7 predicted as {names[0]}": 0.36,
        f"{names[1]}: 6 of 7 predicted as {names[1]}": 0.89,
    }
    text = text_of(page)
    # The class of sample 0: 5 of 6 found, 5 of 7 samples. The other: 6 of 7 and 6 of 7.
    order = [text.index(f"{names[0]} 7 83.3% 71.4% 76.9%"), text.index(f"{names[1]} 7 85.7% 85.7% 85.7%")]
    assert text.index("mean of 2 classes 14 84.5% 78.6% 81.3%") < order[0] < order[1], "lowest F1 first"
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.S)
    sources = [source for source in results.sources if any(source in figure for figure in figures)]
    assert len(figures) == len(sources) == 2
    assert "tench (n01440764), predicted as cat &lt;script" in figures[0] and "97.0%" in figures[0]
    assert "80.0%" in figures[1]
    for figure, light in zip(figures, (True, False), strict=True):
        jpeg = base64.b64decode(re.findall(r'src="data:image/jpeg;base64,([^"]+)"', figure)[0])
        assert (np.asarray(Image.open(io.BytesIO(jpeg))).mean() > 110) == light, "the picture of its class"


def test_worst_samples_are_named_if_the_data_has_changed_or_is_missing(wrong: Path):
    before = (wrong / "data.json").read_text()
    (wrong / "data.json").write_text(json.dumps({**json.loads(before), "sha256": {}}))
    page = page_of(wrong)
    assert "Without pictures:" in page and "has changed since the run" in page and "<img" not in page
    assert page.count("<figure>") == 2
    (wrong / "data.json").write_text(before)
    config = (wrong / "config.json").read_text()
    (wrong / "config.json").write_text(config.replace('/images"', '/gone"'))
    assert "gone does not exist" in page_of(wrong)
    (wrong / "config.json").write_text(config)
    assert "<img" in page_of(wrong)


def test_above_50_classes_the_most_confused_pairs_are_listed(images: Path, tmp_path: Path):
    classes = [f"class {number}" for number in range(51)]
    label = open_dataset(images, "val").label
    best = np.stack([np.where(label == 0, 50, 1), np.zeros(14, int)], axis=1)
    best[np.flatnonzero(label == 0)[0], 0] = 0
    run = write_run(tmp_path / "run", images, classes, best, np.tile(np.float32([0.6, 0.4]), (14, 1)))
    page = page_of(run)
    assert "matrix" not in page and "class 0 class 50 6 85.7%" in text_of(page)
    assert "mean of 3 classes" in page and "class 2<" not in page, "classes without samples are left out"
    write_run(tmp_path / "one", images, classes, np.stack([label, label], axis=1), np.ones((14, 2)))
    assert "Most confused" not in page_of(tmp_path / "one")
    assert "No sample has a wrong class" in page_of(tmp_path / "one")
