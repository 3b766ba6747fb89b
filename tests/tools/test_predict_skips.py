"""Prediction of folders: what packing skips is skipped, and no bad file prevents the other predictions."""

import io
import json
from pathlib import Path

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
        f"error: {top}/cut.jpg: truncated (this run takes pictures)",
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
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    words = rf"^{images} is a packed dataset; use make eval RUN=run DATA={images}\.$"
    with pytest.raises(UserError, match=words):
        predict(run, (images,), device="cpu")


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
