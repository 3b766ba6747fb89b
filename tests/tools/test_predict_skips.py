"""Prediction of folders: what packing skips is skipped, and no bad file prevents the other predictions.

Predictions as tables have a row per input, with the numbers that are printed.
"""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.errors import UserError
from tests.tools.test_predict import answers, untrained
from tests.train_helpers import picture, small
from tools.predict import pack, predict


def as_png(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_is_read_as_packing_reads_it(images: Path, tmp_path: Path, capsys):
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    top = tmp_path / "pets"
    files = {"a.jpg": picture(1, 3), "sub/b.PNG": as_png(picture(0, 4)), "cut.jpg": picture(1, 3)[:300]}
    files |= {"._a.jpg": b"resource fork", ".c.jpg": picture(0, 5), ".git/d.jpg": picture(0, 6)}
    files |= {"notes.txt": b"mine", "sub/Thumbs.db": b"\0"}
    for name, data in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    assert predict(run, (top,), device="cpu") == 1
    printed = capsys.readouterr()
    assert list(answers(printed.out)) == [f"{top}/a.jpg", f"{top}/sub/b.PNG"]
    assert printed.err.splitlines() == [
        f"skipped 1 files without a picture's suffix, such as {top}/notes.txt",
        f"error: {top}/cut.jpg: truncated",
    ]
    (top / "cut.jpg").unlink()
    assert predict(run, (top,), device="cpu") == 0


def test_a_path_that_the_system_refuses_does_not_prevent_other_predictions(
    images: Path, clips: Path, tmp_path: Path, capsys
):
    (tmp_path / "a.jpg").write_bytes(picture(1, 3))
    endless = tmp_path / ("x" * 300)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    assert predict(run, (endless, loop, tmp_path / "a.jpg"), device="cpu") == 1
    printed = capsys.readouterr()
    assert list(answers(printed.out)) == [f"{tmp_path}/a.jpg"]
    assert "File name too long" in printed.err and "symbolic links" in printed.err
    run = untrained(small("video-ft-pico", clips, tmp_path, "clip-run"), 2)
    good = next((clips.parent / "frames/dark_things").iterdir())
    assert predict(run, (endless, loop, good), device="cpu") == 1
    assert list(answers(capsys.readouterr().out)) == [str(good)]


def test_a_folder_without_pictures_is_an_error(images: Path, tmp_path: Path, capsys):
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a")
    assert predict(run, (tmp_path / "texts",), device="cpu") == 1
    assert "a folder without pictures (this run takes pictures)" in capsys.readouterr().err


def test_a_packed_dataset_is_for_make_eval(images: Path, tmp_path: Path):
    words = rf"^{images} is a packed dataset; use python -m train\.evaluate {tmp_path} --data {images}\.$"
    with pytest.raises(UserError, match=words):
        predict(tmp_path, (images,), device="cpu")


def test_imagenet_classes_are_shown_with_words(images: Path, tmp_path: Path, capsys):
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    (run / "data.json").write_text(json.dumps({"classes": ["n01440764", "n02012849"]}))
    (tmp_path / "a.jpg").write_bytes(picture(1, 3))
    assert predict(run, (tmp_path / "a.jpg",), device="cpu") == 0
    (found,) = answers(capsys.readouterr().out).values()
    assert set(found) == {"tench (n01440764)", "crane (n02012849)"}


def test_inputs_of_a_run_on_indexed_tars_share_a_shard(images: Path, tmp_path: Path):
    inputs = [tmp_path / f"{n}.jpg" for n in range(3)]
    for n, path in enumerate(inputs):
        path.write_bytes(picture(0, n))
    (tmp_path / "out").mkdir()
    config = small("image-ft-pico", images, tmp_path, "run")
    names, reasons = pack(config, inputs, {"shard_size": 1, "short_side": 65_535}, tmp_path / "out")
    assert (names, reasons) == ([str(path) for path in inputs], [""] * 3)
    assert len([*(tmp_path / "out/val").glob("*.tar")]) == 1


def test_a_table_has_a_row_per_input_in_every_format(images: Path, tmp_path: Path, capsys):
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 3)
    (run / "data.json").write_text(json.dumps({"classes": ["n01440764", 'a "b", c', "dark"]}))
    inputs = [tmp_path / "a, b.jpg", tmp_path / "cut.jpg", tmp_path / "ü.jpg"]
    for number, path in enumerate(inputs):
        path.write_bytes(picture(number % 2, number)[: 300 if path.stem == "cut" else None])
    assert predict(run, tuple(inputs), device="cpu") == 1
    printed = capsys.readouterr()
    wanted = answers(printed.out)
    assert set(wanted[str(inputs[0])]) == {"tench (n01440764)", 'a "b", c', "dark"}
    found = {}
    for suffix in ("csv", "json", "Parquet"):
        assert predict(run, tuple(inputs), top=2, out=tmp_path / f"out.{suffix}", device="cpu") == 1
        found[suffix] = capsys.readouterr()
        assert found[suffix].out.endswith(f"{tmp_path}/out.{suffix}: 3 rows\n")
        assert found[suffix].err == printed.err, "inputs that fail are also printed"
    rows = pq.read_table(tmp_path / "out.Parquet").to_pylist()
    assert [*rows[0]] == ["input", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert [row["input"] for row in rows] == [str(path) for path in inputs]
    assert rows[1] | {"error": None} == dict.fromkeys(rows[1]) | {"input": str(inputs[1])}
    assert rows[1]["error"] == "truncated"
    for row in (rows[0], rows[2]):
        best = dict(list(wanted[row["input"]].items())[:2])
        assert row["error"] is None and list(best) == [row["class_1"], row["class_2"]]
        assert list(best.values()) == pytest.approx([row["probability_1"], row["probability_2"]], abs=1e-4)
    assert json.loads((tmp_path / "out.json").read_text()) == rows
    with (tmp_path / "out.csv").open(newline="") as file:
        text = list(csv.DictReader(file))
    for wide, row in zip(text, rows, strict=True):
        chances = [float(wide.pop(name) or "nan") for name in ("probability_1", "probability_2")]
        assert chances == pytest.approx(
            [row[f"probability_{rank}"] or float("nan") for rank in (1, 2)], nan_ok=True
        )
        assert {name: value or None for name, value in wide.items()} == {name: row[name] for name in wide}
    assert not list(tmp_path.glob(".out*")), "no temporary file is left"


def test_a_wrong_output_is_an_error_before_any_work(images: Path, tmp_path: Path, capsys):
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    mae = untrained(small("image-mae-pico", images, tmp_path, "mae"), 0)
    missing = (tmp_path / "no.jpg",)
    for folder, name, message in (
        (run, "a.txt", r"a\.txt does not end in \.csv, \.json, \.parquet; name such a file with OUT="),
        (run, "a.png", r"a\.png does not end in \.csv"),
        (mae, "a.csv", r"a\.csv does not end in \.png; name such a file"),
        (run, "gone/a.csv", r"the folder .*gone does not exist; create it"),
    ):
        with pytest.raises(UserError, match=message):
            predict(folder, missing, out=tmp_path / name, device="cpu")
    assert "No such file" not in capsys.readouterr().err
