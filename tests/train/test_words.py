"""ImageNet's synsets are shown with their words; other names and the stored classes do not change."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tools.report import classes
from train.words import lemmas, shown

SYNSETS = ["n01440764", "n02012849", "n03126707", "n15075141"]


def test_synsets_are_shown_with_their_first_word():
    assert shown(SYNSETS) == [
        "tench (n01440764)",
        "crane (n02012849)",  # a bird
        "crane (n03126707)",  # a machine
        "toilet tissue (n15075141)",
    ]
    assert len(lemmas()) > 21_000


def test_other_names_are_unchanged():
    names = ["dark things", "n1", "n99999999", "N01440764", "n01440764x", ""]
    assert shown(names) == names
    assert shown([]) == []
    assert shown([*names, "n01440764"]) == [*names, "tench (n01440764)"]


def test_the_report_shows_words(tmp_path: Path):
    table = {"class_name": SYNSETS[:2], "samples": [4, 4], "correct": [1, 4], "correct5": [4, 4]}
    pq.write_table(pa.table({**table, "accuracy": [0.25, 1.0]}), tmp_path / "per_class.parquet")
    page = classes(tmp_path / "per_class.parquet")
    assert page.index("<th>tench (n01440764)</th>") < page.index("<th>crane (n02012849)</th>")
    assert pq.read_table(tmp_path / "per_class.parquet")["class_name"].to_pylist() == SYNSETS[:2]
