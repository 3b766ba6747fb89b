"""A step that is not finite is recorded; `make replay` repeats any step in every bit; steps are profiled."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from pipelines.files import sha256_of
from tests.train_helpers import small
from train import badstep, checkpoint, loop, mae, replay
from train.config import MaeConfig
from train.metrics import read_csv

POISONED = "blocks.2.mlp.fc1"


def settings(images: Path, root: Path) -> MaeConfig:
    """9 steps of two micro batches: rows every 2 steps, checkpoints after 4, 8 and 9."""
    config = small("image-mae-pico", images, root, "run", epochs=1.35, batch=6, lr_batch=6)
    assert isinstance(config, MaeConfig)
    run = replace(config.run, log_every=2, eval_every=100, checkpoint_every=4, max_skipped=2, keep=9)
    return replace(config, run=run, speed=replace(config.speed, micro_batch=3, profile="2:3"))


def listing(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    config = settings(images, tmp_path_factory.mktemp("runs"))
    assert loop.fit(config, mae.make_task) == 0
    return config.run.folder


@pytest.fixture(scope="module")
def failed(run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, resumed from a checkpoint of step 4 in which the weights of a layer make it overflow."""
    root = tmp_path_factory.mktemp("failed")
    path = root / "run/checkpoints/step-000000004.pt"
    path.parent.mkdir(parents=True)
    values = torch.load(run / "checkpoints" / path.name)
    values["model"][f"{POISONED}.weight"].fill_(3e38)
    torch.save(values, path)
    path.with_suffix(".sha256").write_text(sha256_of(path))
    with pytest.raises(UserError, match="2 steps up to step 6 had non-finite gradients"):
        loop.fit(settings(images, root), mae.make_task)
    return root / "run"


def test_a_bad_step_is_recorded_with_its_rows_and_first_layer(failed: Path, images: Path):
    report = json.loads((failed / "bad-step-5.json").read_text())
    assert report["step"] == 5 and not math.isfinite(float(report["loss"]))
    assert report["first_nonfinite"] == {"pass": "forward", "layer": POISONED, "process": 0}
    assert not math.isfinite(float(report["gradient_norms"]["blocks.0"]))
    rows, dataset = report["rows"], open_dataset(images, "train")
    assert len(rows) == 6 and not any(math.isfinite(float(row["loss"])) for row in rows)
    assert {row["epoch"] for row in rows} == {0}  # rows 24 to 29 of an epoch of 40
    for row in rows:
        folder = "light things" if dataset.label[row["id"]] else "dark things"
        assert row["source"].startswith(f"train/{folder}/")
    log = (failed / "log.txt").read_text()
    assert f"step 5: the loss or the gradient is not finite, first in {POISONED} (forward)" in log
    kept = failed / "checkpoints/kept-step-000000004.pt"
    assert sha256_of(kept) == kept.with_suffix(".sha256").read_text()


def test_the_replay_of_a_bad_step_finds_what_the_run_recorded(failed: Path):
    recorded = json.loads((failed / "bad-step-5.json").read_text())
    for path in (failed / "checkpoints").glob("step-*"):
        path.unlink()  # the run has deleted it since
    report = replay.replay(replay.Arguments(failed, 5, device="cpu"))
    assert report["from_step"] == 4 and report["skipped"] and report["loss_equal"]
    assert report["first_nonfinite"] == recorded["first_nonfinite"]
    written = json.loads((failed / "replay-5.json").read_text())
    assert written["rows"] == recorded["rows"] and written["gradient_norms"] == recorded["gradient_norms"]


def test_a_replay_equals_the_run_in_every_bit(run: Path, capsys: pytest.CaptureFixture):
    before = listing(run)
    report = replay.replay(replay.Arguments(run, 8, device="cpu"))
    assert listing(run) == {**before, "replay-8.json": sha256_of(run / "replay-8.json")}
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert (report["from_step"], report["rows_compared"], report["rows_equal"]) == (4, 2, 2)
    rows = {row["step"]: row for row in read_csv(run / "metrics.csv")}
    seventh = 2 * rows[8]["loss_train"] - report["loss"]  # a row has the mean of two steps
    assert report["first_nonfinite"] is None and not report["skipped"] and 0 < seventh < 3
    losses = [row["loss"] for row in report["rows"]]
    assert sum(losses) / len(losses) == pytest.approx(report["loss"], rel=1e-5)
    squares = sum(norm**2 for norm in report["gradient_norms"].values())
    assert math.sqrt(squares) == pytest.approx(rows[8]["grad_norm"], rel=1e-4)
    capsys.readouterr()
    replay.show(report)
    printed = capsys.readouterr().out
    assert "bit-identical: 2 of 2 metric rows since step 4" in printed
    assert "first non-finite value: none" in printed and "train/light things/" in printed


def test_a_replay_without_a_checkpoint_begins_at_the_start(run: Path):
    report = replay.replay(replay.Arguments(run, 2, device="cpu"))
    assert (report["from_step"], report["rows_compared"], report["rows_equal"]) == (0, 1, 1)


def test_a_replay_has_the_rows_of_the_run_also_if_its_intervals_have_changed(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((copy / "config.json").read_text())
    config["run"]["log_every"] = 1  # the last command's, when nothing was left to train
    (copy / "config.json").write_text(json.dumps(config))
    report = replay.replay(replay.Arguments(copy, 6, device="cpu"))
    assert (report["from_step"], report["rows_compared"], report["rows_equal"]) == (4, 1, 1)


def test_a_replay_begins_at_the_newest_valid_checkpoint(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    damaged = copy / "checkpoints/step-000000008.pt"
    damaged.write_bytes(b"no checkpoint")
    before = listing(copy)
    report = replay.replay(replay.Arguments(copy, 9, device="cpu"))
    assert (report["from_step"], report["rows_compared"], report["rows_equal"]) == (4, 3, 3)
    assert listing(copy) == {**before, "replay-9.json": sha256_of(copy / "replay-9.json")}


def test_a_replay_begins_at_the_start_if_no_checkpoint_is_valid(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for path in (copy / "checkpoints").glob("*.pt"):
        path.write_bytes(b"no checkpoint")
    before = listing(copy)
    report = replay.replay(replay.Arguments(copy, 6, device="cpu"))
    assert (report["from_step"], report["rows_compared"], report["rows_equal"]) == (0, 3, 3)
    assert listing(copy) == {**before, "replay-6.json": sha256_of(copy / "replay-6.json")}


@pytest.mark.parametrize("step", [0, 10])
def test_a_step_that_the_run_does_not_have_is_refused(run: Path, step: int):
    with pytest.raises(UserError, match=f"step {step} is not one of .*choose a step from 1 to 9"):
        replay.replay(replay.Arguments(run, step))


def test_a_non_finite_gradient_is_found_in_the_backward_pass():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    places: list[tuple[str, str]] = []
    with badstep._watched(layers, places):
        hidden = layers[0](torch.ones(1, 2))
        (hidden - hidden.detach()).sqrt().sum().backward()  # finite, with an infinite slope
    assert places == [("backward", "0")]


def test_a_run_writes_a_trace_of_the_named_steps(run: Path):
    (path,) = (run / "profile").iterdir()
    assert path.name.startswith("steps-2-3.") and path.name.endswith(".pt.trace.json")
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2
    assert f"profiled steps-2-3: {run}/profile" in (run / "log.txt").read_text()


def test_reports_are_valid_json(tmp_path: Path):
    path = badstep.write(tmp_path / "report.json", {"loss": float("nan"), "rows": [{"loss": float("-inf")}]})
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values == {"loss": "NaN", "rows": [{"loss": "-Infinity"}]}


def test_the_checkpoint_before_a_step_is_kept(tmp_path: Path):
    for step in (4, 8):
        checkpoint.save(tmp_path, step, {}, keep=9)
    checkpoint.keep_before(tmp_path, 8)
    checkpoint.save(tmp_path, 12, {}, keep=1)
    assert [path.name for path in checkpoint.before(tmp_path, 99)] == [
        "kept-step-000000004.pt",
        "step-000000012.pt",
    ]
