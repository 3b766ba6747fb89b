"""Prediction: the numbers of evaluation for any files; unreadable files are named."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import load_weights
from models.layers import NormalizedInput
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from tests.pipelines_fixtures import read_rows
from tests.train_helpers import CLASSES, picture, small
from tools.pack import ImageOptions, pack_images
from tools.predict import predict
from train import build, evaluate, finetune, loop
from train.config import Config, FinetuneConfig, to_dict
from train.distributed import World
from train.evaluate import TASKS
from train.mae import GAP, HEADER
from train.rundir import Run
from train.task import batches_of, create_classifier

SIZES = ((72, 72), (300, 400), (1200, 330), (30, 90))  # packing scales three of them down


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on pictures of several sizes and formats, a few of them in the wrong class."""
    root = tmp_path_factory.mktemp("predict")
    for split, count in (("train", 12), ("val", 9)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                shown = 1 - label if split == "val" and i >= 7 + label else label
                image = Image.open(io.BytesIO(picture(shown, 100 * i + label + 7000 * (split == "val"))))
                image = image.resize(SIZES[i % 4], Image.Resampling.BICUBIC)
                grain = np.random.default_rng(i).integers(-90, 90, (*image.size[::-1], 1))
                image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
                path = root / "source" / split / name / f"{i}.{('jpg', 'png')[i % 2]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    assert pack_images(root / "source", root / "data", ImageOptions(workers=1, short_side=40)) == 0
    config = small("image-ft-pico", root / "data", root, "run", epochs=6.0, lr=2e-3)
    build.check(config)
    assert loop.fit(config, finetune.make_task) == 0
    return root / "run"


@torch.no_grad()
def untrained(config: Config, classes: int) -> Path:
    """The folder of a run with random weights, the head's large enough to have an opinion."""
    run = config.run.root / config.run.name
    run.mkdir()
    torch.manual_seed(0)
    model = TASKS[type(config)](config, Run(World(0, 1, torch.device("cpu"))), ["a"] * classes).model
    if classes:
        model.get_parameter("head.projection.weight").mul_(40)
    save_file(model.state_dict(), run / "model.safetensors")
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    return run


@torch.no_grad()
def expected(run: Path) -> dict[str, list[float]]:
    """Each validation sample's probabilities by its source, from the run's own packed data."""
    config = evaluate.read_config(run)
    assert isinstance(config, FinetuneConfig)
    catalogue = open_dataset(config.data.path, "val")
    model = create_classifier(config.data, config.model, len(catalogue.info.classes))
    load_weights(model, run / "model.safetensors")
    ready = NormalizedInput(model, config.data.frames).eval()
    sources = [row["source"] for row in read_rows(config.data.path, "val")]
    found, views = {}, config.views[0] * config.views[1]
    for batch in batches_of(config, World(0, 1, torch.device("cpu")), catalogue, config.views):
        rows = ready(batch.pixels).softmax(-1).unflatten(0, (-1, views)).mean(1)
        found |= {sources[i]: row for i, row in zip(batch.ids[::views], rows.tolist(), strict=True)}
    return found


def answers(text: str) -> dict[str, dict[str, float]]:
    """What predict printed: input -> class -> probability."""
    found: dict[str, dict[str, float]] = {}
    name = ""
    for line in text.splitlines():
        if told := re.fullmatch(r" *([\d.]+)%  (.*)", line):
            found[name][told[2]] = float(told[1]) / 100
        else:
            name = line
            found[name] = {}
    return {name: classes for name, classes in found.items() if classes}


def test_pictures_get_the_predictions_of_evaluation(trained: Path, capsys):
    source = trained.parent / "source"
    inputs = sorted((source / "val").rglob("*.*"))
    assert predict(trained, tuple(inputs), device="cpu") == 0
    printed = capsys.readouterr().out
    got, best = answers(printed), trained / "best.safetensors"
    of_the_best = f"(the last step; of the best evaluation: WEIGHTS={best} (--weights))"
    assert f"weights: {trained}/model.safetensors {of_the_best}" in printed.splitlines()
    assert predict(trained, tuple((source / "val").iterdir()), device="cpu") == 0
    assert answers(capsys.readouterr().out) == got, "folders of pictures are their pictures"
    wanted = expected(trained)
    assert len(got) == len(inputs) == len(wanted) == 18
    right = dict.fromkeys(CLASSES, 0)
    for path in inputs:
        told = got[str(path)]
        assert list(told.values()) == sorted(told.values(), reverse=True)
        exact = wanted[path.relative_to(source).as_posix()]
        assert [told[name] for name in CLASSES] == pytest.approx(exact, abs=1e-4)
        right[path.parent.name] += path.parent.name == next(iter(told))
    scores = evaluate.evaluate(evaluate.Arguments(trained, device="cpu"))
    assert 0.5 < scores["acc"] == sum(right.values()) / 18 < 1
    rows = pq.read_table(trained / "predictions.parquet").to_pylist()
    hits = [row["class_name"] for row in rows if row["class_1"] == row["class_name"]]
    assert {name: hits.count(name) for name in CLASSES} == right


def test_clips_get_the_mean_of_their_views(clips: Path, tmp_path: Path, capsys):
    config = small("video-ft-pico", clips, tmp_path, "run")
    assert isinstance(config, FinetuneConfig)
    run = untrained(replace(config, views=(2, 3)), 2)
    frames = clips.parent / "frames"
    wanted = expected(run)
    assert predict(run, tuple(frames / source for source in wanted), device="cpu") == 0
    text = capsys.readouterr().out
    assert "has no data.json with its classes: they are read from" in text
    got = answers(text)
    for source, exact in wanted.items():
        assert [got[str(frames / source)][name] for name in CLASSES] == pytest.approx(exact, abs=1e-4)
    assert len({round(row[0], 3) for row in wanted.values()}) > 1  # the clips do differ

    video = tmp_path / "clip.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width = stream.height = 72
        for i in range(40):
            noise = np.random.default_rng(i).integers(0, 255, (72, 72, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        container.mux(stream.encode())
    still = tmp_path / "still.jpg"
    still.write_bytes(picture(0, 0))
    inner = tmp_path / "videos/cats"
    inner.mkdir(parents=True)
    for name in ("b.mp4", "a.mp4"):
        shutil.copy(video, inner / name)
    (inner / "notes.txt").write_text("not a video")
    assert predict(run, (tmp_path / "videos",), device="cpu") == 0
    told = capsys.readouterr()
    assert list(answers(told.out)) == [str(inner / "a.mp4"), str(inner / "b.mp4")]
    assert told.err == f"skipped 1 files without a video's suffix, such as {inner}/notes.txt\n"
    assert predict(run, (still, video), top=1, device="cpu") == 1
    told = capsys.readouterr()
    assert re.search(r"^error: .*/still\.jpg: [^\n]+\n\Z", told.err)
    (chances,) = answers(told.out).values()
    assert len(chances) == 1 and 0.5 <= next(iter(chances.values())) <= 1


@pytest.mark.parametrize("preset", ["image-mae-pico", "video-mae-pico"])
def test_an_autoencoder_draws_its_inputs(trained: Path, clips: Path, tmp_path: Path, capsys, preset: str):
    image = preset.startswith("image")
    run = untrained(small(preset, trained.parent / "data" if image else clips, tmp_path, "run"), 0)
    top = trained.parent / "source" / "val" / CLASSES[0] if image else clips.parent / "frames/dark_things"
    inputs = tuple(sorted(top.iterdir())[:3])
    assert predict(run, inputs, out=tmp_path / "seen.png", device="cpu") == 0
    assert all(str(path) in capsys.readouterr().out.replace(", ", "\n") for path in inputs[:1])
    drawn = Image.open(tmp_path / "seen.png")
    strip = HEADER + 64 * int(drawn.info["zoom"]) + GAP  # an image has its three pictures in one row
    assert drawn.height == 3 * (strip if image else 3 * strip) + HEADER, "three inputs and a note"
    assert not (run / "predict.png").exists()


def test_wrong_inputs_are_named_and_the_others_are_predicted(trained: Path, tmp_path: Path, capsys):
    good, text, empty, missing = (tmp_path / name for name in ("ü-good.jpg", "no.jpg", "empty", "gone.jpg"))
    good.write_bytes(picture(1, 3))
    text.write_text("not a picture")
    empty.mkdir()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:300])
    assert predict(trained, (text, empty, good, missing, cut), device="cpu") == 1
    told = capsys.readouterr()
    assert list(answers(told.out)) == [str(good)]
    reasons = dict(re.fullmatch(r"error: (.*?): (.*)", line).groups() for line in told.err.splitlines())
    assert set(reasons) == {str(path) for path in (text, empty, missing, cut)}
    assert "not an image" in reasons[str(text)] and "(this run takes pictures)" in reasons[str(empty)]
    assert "No such file" in reasons[str(missing)] and "truncated" in reasons[str(cut)]
    video = tmp_path / "a.mp4"
    video.write_bytes(b"no picture")
    assert predict(trained, (missing, video), device="cpu") == 1  # nothing left to answer
    told = capsys.readouterr()
    assert "a.mp4: not an image (this run takes pictures)" in told.err and not told.out


def test_an_input_with_nan_probabilities_has_no_prediction(images: Path, tmp_path: Path, capsys):
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    weights = load_file(run / "model.safetensors")
    weights["head.projection.weight"][0], weights["head.projection.weight"][1] = 3e38, -3e38  # overflows
    save_file(weights, run / "model.safetensors")
    (tmp_path / "a.jpg").write_bytes(picture(1, 3))
    assert predict(run, (tmp_path / "a.jpg",), device="cpu") == 1
    said = capsys.readouterr()
    assert said.err == f"error: {tmp_path}/a.jpg: the model's probabilities for it are not finite\n"
    assert answers(said.out) == {}


def test_predict_refuses_to_run_in_several_processes(images: Path, tmp_path: Path, monkeypatch):
    run = untrained(small("image-ft-pico", images, tmp_path, "run"), 2)
    (tmp_path / "a.jpg").write_bytes(picture(1, 3))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"start tools\.predict without torchrun"):
        predict(run, (tmp_path / "a.jpg",), device="cpu")


def test_an_empty_folder_of_frames_is_named(clips: Path, tmp_path: Path, capsys):
    run = untrained(small("video-ft-pico", clips, tmp_path, "run"), 2)
    (tmp_path / "empty").mkdir()
    assert predict(run, (tmp_path / "empty",), device="cpu") == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/empty: no frames in its folder\n"


def test_classes_are_kept_without_the_data_and_their_loss_is_reported(trained: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.jpg").write_bytes(picture(1, 3))
    assert predict(run, (tmp_path / "a.jpg",), device="cpu") == 0
    text = capsys.readouterr().out
    assert "gone cannot be read: inputs are packed with the default" in text and set(
        answers(text)[str(tmp_path / "a.jpg")]
    ) == set(CLASSES)
    (run / "data.json").unlink()
    with pytest.raises(UserError, match=r"has no data\.json with its classes.*gone does not exist"):
        predict(run, (tmp_path / "a.jpg",), device="cpu")


def test_wrong_arguments_end_with_one_line(trained: Path, tmp_path: Path):
    some = (tmp_path / "a.jpg",)
    for expected_words, arguments in {
        "does not exist; name a run folder": (tmp_path, some),
        "there are no inputs; name at least one picture": (trained, ()),
        "--top is 0; it must be at least 1": (trained, some, 0),
        "nowhere does not exist": (trained, some, 5, tmp_path / "nowhere"),
    }.items():
        with pytest.raises(UserError, match=expected_words):
            predict(*arguments)
