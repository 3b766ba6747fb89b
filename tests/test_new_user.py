"""Mistakes of a first day: every message names the user's own path or setting, and says what to change."""

import errno
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.errors import UserError, answer
from pipelines.files import atomic_text, atomic_write
from tests import LONG
from tests.test_project import call_make
from tests.tools.test_pack import CLIPS, clip_tree, encoded, pack_images, pixels, write
from tests.train_helpers import call, make_images, small
from tools import pack
from tools.format3 import convert
from tools.pack import ClipOptions
from tools.packing import next_commands
from tools.stage import stage
from train import build, evaluate, finetune, loop, mae
from train.distributed import World
from train.rundir import Run

ALONE = World(0, 1, torch.device("cpu"))


# ---- packed data ------------------------------------------------------------------------------------------


def test_converting_a_folder_that_does_not_exist(tmp_path: Path):
    words = rf"^{tmp_path}/nope/dataset\.json does not exist; give the top folder of a packed dataset$"
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "nope")


def test_an_error_of_writing_names_the_file_and_not_its_temporary_one(tmp_path: Path, capsys):
    def by_pyarrow(path: Path) -> None:
        with atomic_write(path) as temporary:
            pq.write_table(pa.table({"a": [1]}), temporary)

    for writes in (lambda path: atomic_text(path, "text"), by_pyarrow):
        for folder, number in (("gone", errno.ENOENT), ("file", errno.ENOTDIR)):
            (tmp_path / "file").write_text("")
            path = tmp_path / folder / "a.txt"
            with pytest.raises(OSError) as caught:
                writes(path)
            assert (caught.value.errno, caught.value.filename) == (number, str(path))
            assert ".tmp-" not in str(caught.value)
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match=r"taken'$") as caught:  # of the rename at the end
        atomic_text(tmp_path / "taken", "text")
    assert ".tmp-" not in str(caught.value)
    assert answer(caught.value) == 2
    assert "taken: Is a directory; choose a file, not a folder\n" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text("{}")
    for target in (tmp_path / "file", tmp_path / "file/copy"):
        with pytest.raises(OSError) as caught:
            stage(str(tmp_path), target)
        assert answer(caught.value) == 2
        assert re.search(r"file(/copy)?: .*; choose a folder, not a file$", capsys.readouterr().err)


def test_one_broken_picture_of_60_suggests_max_reject(tmp_path: Path, capsys):
    for number in range(59):
        write(tmp_path / "source" / f"{number}.jpg", encoded(pixels(number)))
    write(tmp_path / "source/bad.jpg", b"")
    assert pack_images(tmp_path / "source", tmp_path / "out") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "To accept that, add --max-reject 0.017 (with make: in ARGS=)." in said
    assert pack_images(tmp_path / "source", tmp_path / "out", max_reject=0.017) == 0


def test_the_top_folder_of_tiny_kinetics_as_frames(tmp_path: Path):
    clip_tree(tmp_path, CLIPS, frames=2)
    (tmp_path / "frames").rename(tmp_path / "data_30fps_frames")
    options = ClipOptions(workers=1)
    assert pack.pack_clips(tmp_path / "annotations", tmp_path / "out", options, frames=tmp_path) == 0


def test_packing_ends_with_commands_that_train_on_the_result(images: Path, clips: Path, tmp_path: Path):
    for number, (shards, kind) in enumerate(((images, "image"), (clips, "video"))):
        shutil.copytree(shards, data := tmp_path / f"Bob's $data {number}")
        lines = next_commands(data).splitlines()
        assert [line.split(":")[0] for line in lines] == ["to pretrain", "to finetune", "without a GPU"]
        for line, task in zip(lines, ("mae", "ft"), strict=False):
            printed = shlex.split(call_make("-n", *shlex.split(line.partition(": make ")[2])))
            preset = printed.index(f"{kind}-{task}-base")
            assert printed[preset + 1 : preset + 3] == ["--data.path", str(data)]
    for number in range(10):
        write(tmp_path / "source" / f"{number}.jpg", encoded(pixels(number)))
    assert pack_images(tmp_path / "source", tmp_path / "out") == 0
    assert "finetune" not in next_commands(tmp_path / "out"), "the pictures have no classes"


# ---- training ---------------------------------------------------------------------------------------------


def test_starting_weights_that_do_not_fit_leave_no_run_folder(images: Path, tmp_path: Path):
    config = small("image-mae-pico", images, tmp_path / "runs", "run", epochs=1.0)
    wrong = replace(config, model=replace(config.model, init=str(tmp_path / "none.pth")))
    for _ in range(2):
        with pytest.raises(UserError, match=r"starting weights: there is no weights file"):
            loop.fit(wrong, mae.make_task)
        assert not config.run.folder.exists()
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="there is no weights file"):
        loop.fit(wrong, mae.make_task)
    assert (config.run.folder / "notes.txt").exists(), "a folder with other files is kept"
    assert loop.fit(config, mae.make_task) == 0
    before = sorted(config.run.folder.rglob("*"))
    fewer = replace(config, optim=replace(config.optim, epochs=0.5))
    with pytest.raises(UserError):
        loop.fit(fewer, mae.make_task)
    assert sorted(config.run.folder.rglob("*")) == before


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished finetuning run."""
    config = small("image-ft-pico", images, tmp_path_factory.mktemp("trained"), "run", epochs=1.0)
    assert loop.fit(config, finetune.make_task) == 0
    return config.run.folder


def test_weights_to_evaluate_are_not_called_starting_weights(trained: Path, tmp_path: Path):
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=rf"^weights: {tmp_path}/bad\.pth "):
        evaluate.evaluate(evaluate.Arguments(trained, weights=tmp_path / "bad.pth", device="cpu"))


def test_held_out_is_left_out_for_data_that_the_run_does_not_know(
    trained: Path, images: Path, tmp_path: Path
):
    own = evaluate.evaluate(evaluate.Arguments(trained, device="cpu"))
    assert own["held_out"] == 1
    shutil.copytree(images, tmp_path / "copy")
    assert evaluate.evaluate(evaluate.Arguments(trained, data=tmp_path / "copy", device="cpu")) == own
    other = make_images(tmp_path, train=3, val=2)
    scores = evaluate.evaluate(evaluate.Arguments(trained, data=other, device="cpu"))
    assert set(scores) == set(own) - {"held_out"}
    # The run trained and evaluated on its own train split, which says nothing about another one.
    config = json.loads((trained / "config.json").read_text())
    config["data"]["eval_split"] = "train"
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert evaluate.evaluate(evaluate.Arguments(tmp_path / "run", device="cpu"))["held_out"] == 0
    scores = evaluate.evaluate(evaluate.Arguments(tmp_path / "run", data=other, device="cpu"))
    assert "held_out" not in scores


def test_a_learning_rate_of_0_and_a_batch_above_the_data_say_what_to_change(
    images: Path, tmp_path: Path, capsys
):
    def logged(**optim: object) -> str:
        config = small("image-mae-pico", images, tmp_path, "plan", **optim)
        build.log_plan(config, mae.make_task(config, Run(ALONE)), ALONE)
        return capsys.readouterr().out

    text = logged(batch=60, epochs=1.0, warmup_epochs=0.9)  # 1 step, of which 1 is warmup
    assert "lower optim.batch to at most 40 (the learning rate is scaled with it)" in text
    words = (
        "warmup takes 0.9 epochs: the learning rate rises to the very end, and is 0 in the first of 1 steps; "
        "set optim.warmup_epochs further below optim.epochs (1), or to 0"
    )
    assert words in text
    assert "warmup takes" not in logged(batch=60, epochs=1.0, warmup_epochs=0.0)


def test_a_small_validation_split_is_reported(images: Path, tmp_path: Path, capsys, monkeypatch):
    words = (
        "warning: only 14 samples are evaluated: acc changes in steps of 0.071; "
        "small differences may be chance"
    )
    config = small("image-ft-pico", images, tmp_path, "few")
    finetune.make_task(config, Run(ALONE))
    assert words in capsys.readouterr().out
    monkeypatch.setattr(finetune, "FEW", 14)
    finetune.make_task(config, Run(ALONE))
    assert "are evaluated" not in capsys.readouterr().out


# ---- the command line -------------------------------------------------------------------------------------


def test_a_value_of_the_wrong_type_gives_a_box_without_a_traceback():
    done = call("train.mae", "image-mae-pico", "--optim.lr", "high")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Error parsing --optim.lr: could not convert string to float: 'high'" in done.stderr


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, marks=LONG) for words in (("--optim.batch", "0"), ("--data.path", "s3://b/x"))],
)
def test_under_torchrun_a_wrong_word_prints_its_error_once(words: tuple[str, str]):
    torchrun = ("--nproc-per-node", "2", "--master-port", "0", "--standalone", "-m", "train.mae")
    done = call("torch.distributed.run", *torchrun, "image-mae-pico", *words)
    assert done.returncode != 0
    expected = {
        "0": "optim.batch is 0",
        "high": "Error parsing --optim.lr",
        "s3://b/x": "is not a local path",
    }
    assert done.stderr.count(expected[words[1]]) == 1, done.stderr
