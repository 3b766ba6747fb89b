"""Options of recipes: optimizers, averages, frozen trunks, compilation; and the files of a run."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
from models.layers import NormalizedInput
from pipelines.config import Augment
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from pipelines.views import eval_rows, train_rows
from tests import LONG
from tests.train_helpers import call, make_images, small
from tools.report import report
from train import build, checkpoint, evaluate, finetune, loop, mae, optim
from train.config import MaeConfig, OptimConfig, to_dict
from train.console import curve
from train.distributed import World
from train.metrics import read_csv
from train.presets import FINETUNE_PRESETS
from train.rundir import Run

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def fit(config, task) -> Path:
    build.check(config)
    assert loop.fit(config, task) == 0
    return config.run.folder


def pico(**settings) -> nn.Module:
    torch.manual_seed(0)
    return models.create("hiera_pico_96", input_size=(64, 64), num_classes=3, **settings)


# ---- optimizers ------------------------------------------------------------------------------------------


@pytest.fixture
def filled_memory(monkeypatch):
    """Memory that is not initialized is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_with_momentum_equals_torchs_and_skips_non_finite_gradients(filled_memory, nesterov):
    model, oracle = nn.Linear(3, 2), nn.Linear(3, 2)
    oracle.load_state_dict(model.state_dict())
    model.no_weight_decay = set
    settings = OptimConfig(name="sgd", lr=0.1, lr_batch=8, batch=8, momentum=0.8, weight_decay=0.0)
    settings = replace(settings, nesterov=nesterov)
    ours = optim.make_optimizer(model, settings)
    theirs = torch.optim.SGD(oracle.parameters(), lr=0.1, momentum=0.8, nesterov=nesterov)
    for value in (float("nan"), 1.0, float("nan"), 2.0, float("inf"), -1.0):
        for net in (model, oracle):
            (net(torch.ones(1, 3)) * value).sum().backward()
        _, skipped = optim.update(model, ours, clip_norm=0.0)
        assert skipped.item() == (not np.isfinite(value))
        if np.isfinite(value):
            theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("last_block_decays", [True, False])
def test_both_conventions_of_layer_decay(last_block_decays):
    model = pico()
    settings = OptimConfig(layer_decay=0.5, decay_last_block=last_block_decays)
    groups = optim.make_optimizer(model, settings).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    depth = len(model.blocks)
    off = 0 if last_block_decays else 1
    assert scale[id(model.head.projection.weight)] == 1
    assert scale[id(model.blocks[-1].mlp.fc1.weight)] == 0.5 ** (1 - off)
    assert scale[id(model.blocks[0].mlp.fc1.weight)] == 0.5 ** (depth - off)
    assert scale[id(model.patch_embed.proj.weight)] == 0.5 ** (depth + 1 - off)


def test_averaged_weights_are_evaluated_saved_and_exported(images, tmp_path):
    config = small("image-ft-pico", images, tmp_path, "ema", epochs=2.0)
    config = replace(
        config, optim=replace(config.optim, ema=0.9), run=replace(config.run, checkpoint_every=1)
    )
    config = replace(config, run=replace(config.run, keep=100))
    run = fit(config, finetune.make_task)
    average = None
    for path in sorted((run / "checkpoints").glob("*.pt")):
        state = torch.load(path, weights_only=True)
        if average is not None:
            average = {n: 0.9 * v + 0.1 * state["model"][n] for n, v in average.items()}
            for name, value in state["ema"].items():
                torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
        average = state["ema"]
    exported = load_file(run / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in state["ema"].items())
    assert not torch.equal(exported["head.projection.weight"], state["model"]["head.projection.weight"])
    found = evaluate.evaluate(evaluate.Arguments(run, device="cpu"))
    assert found == {name: read_csv(run / "metrics.csv")[-1][name] for name in found}


def test_a_frozen_trunk_does_not_change(images, tmp_path):
    start = tmp_path / "start.pt"
    torch.save(pico().state_dict(), start)
    config = small("image-ft-pico", images, tmp_path, "probe", epochs=2.0)
    config = replace(config, freeze="trunk", model=replace(config.model, init=str(start)))
    run = fit(config, finetune.make_task)
    before, after = torch.load(start, weights_only=True), load_file(run / "model.safetensors")
    changed = {name for name, value in after.items() if name not in before or not value.equal(before[name])}
    assert changed == {"norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias"}
    assert "frozen trunk" in (run / "log.txt").read_text()


# ---- files of a run --------------------------------------------------------------------------------------


def test_best_weights_predictions_and_steps_are_kept(images, tmp_path):
    config = small("image-ft-pico", images, tmp_path, "run", epochs=5.0, lr=2e-3)
    config = replace(config, run=replace(config.run, detail=True, eval_every=2))
    run = fit(config, finetune.make_task)
    rows = read_csv(run / "metrics.csv")
    best = evaluate.evaluate(evaluate.Arguments(run, weights=run / "best.safetensors", device="cpu"))
    assert best["acc"] == max(row["acc"] for row in rows if row["acc"] is not None)
    samples = pq.read_table(run / "predictions.parquet").to_pylist()
    assert [row["id"] for row in samples] == [*range(14)]
    assert sum(row["class_1"] == row["class_name"] for row in samples) / 14 == rows[-1]["acc"]
    assert json.loads((run / "data.json").read_text())["classes"] == ["dark things", "light things"]
    with (run / "detail/rank-0-from-000000000.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [int(row["step"]) for row in steps] == list(range(1, rows[-1]["step"] + 1))
    first = [float(row["loss"]) for row in steps[: rows[0]["step"]]]
    assert rows[0]["loss"] == pytest.approx(sum(first) / len(first))


def test_views_of_an_autoencoder_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(MaeConfig())))
    with pytest.raises(UserError, match="is an autoencoder, which has no views; leave out --views"):
        evaluate.evaluate(evaluate.Arguments(tmp_path, views=(5, 3), device="cpu"))


def test_a_run_without_better_results_ends_early_and_its_best_one_is_shown(images, tmp_path):
    config = small("image-ft-pico", images, tmp_path, "run", epochs=4.0, lr=1e-12)  # it learns nothing
    settings = replace(config.run, eval_every=2, patience=3, checkpoint_every=100)
    run = fit(replace(config, run=settings), finetune.make_task)
    rows = [row for row in read_csv(run / "metrics.csv") if row["acc"] is not None]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    log, best = (run / "log.txt").read_text(), f"best acc {rows[0]['acc']:.4g} at step 2"
    assert "stopped early after step 8 of 14" in log and log.count(best) == 5, "of 4 rows, and at the end"
    assert best.removeprefix("best acc ") in call("train.evaluate", str(run), "--device", "cpu").stdout
    state = load_file(run / "model.safetensors")
    save_file(state | {"head.projection.weight": torch.zeros(2, 384)}, tmp_path / "zero.safetensors")
    other = call(
        "train.evaluate", str(run), "--weights", str(tmp_path / "zero.safetensors"), "--device", "cpu"
    )
    assert "acc 0.5" in other.stdout and "during training" not in other.stdout
    assert "acc is not above 0.5, that of always predicting the most frequent class" in other.stdout
    assert f"{rows[0]['acc']:.1%} (step 2," in report(run).read_text()
    before = (run / "metrics.csv").read_bytes()
    fit(replace(config, run=settings), finetune.make_task)  # from the checkpoint of step 8: nothing is left
    assert (run / "metrics.csv").read_bytes() == before
    fit(replace(config, run=replace(settings, patience=0)), finetune.make_task)
    assert read_csv(run / "metrics.csv")[-1]["step"] == 14, "without patience it continues to its end"
    (run / "model.safetensors").unlink()
    fit(replace(config, run=replace(settings, patience=1)), finetune.make_task)
    assert "stopped early after step 14" not in (run / "log.txt").read_text(), "no step was left"


def test_other_data_is_refused_on_resume_and_other_classes_in_evaluation(images, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    config = small("image-ft-pico", data, tmp_path, "run", epochs=2.0)
    run = fit(config, finetune.make_task)
    (run / "model.safetensors").rename(tmp_path / "weights.safetensors")
    shutil.rmtree(data)
    shutil.copytree(make_images(tmp_path, train=21), data)
    with pytest.raises(UserError, match=r"is not the data that .* was trained on so far"):
        loop.fit(config, finetune.make_task)
    longer = replace(config, optim=replace(config.optim, epochs=3.0))
    with pytest.raises(UserError, match=r"optim\.epochs: 2\.0 -> 3\.0.*--run\.allow"):
        loop.fit(longer, finetune.make_task)
    allowed = replace(longer, run=replace(longer.run, allow=("optim.epochs", "data")))
    fit(allowed, finetune.make_task)
    info = json.loads((data / "dataset.json").read_text())
    info["classes"][0] = "n01440764"
    (data / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"other classes than .* class 0 is tench \(n01440764\), the run's"):
        evaluate.evaluate(evaluate.Arguments(run, device="cpu"))
    info["classes"].append("third")
    (data / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"has 3 classes, and the model of .*run has 2; choose another RUN"):
        loop.fit(replace(allowed, optim=replace(config.optim, epochs=4.0)), finetune.make_task)
    (run / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        loop.fit(allowed, finetune.make_task)
    info["splits"]["train"]["samples"] = 0
    (data / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"has no readable train sample; .*train\.arrow says why"):
        build.check(config)


def test_unusual_settings_give_a_warning(images, tmp_path, capsys):
    def logged(repeats: int = 1, **optim: object) -> str:
        config = small("image-mae-pico", images, tmp_path, "plan", **optim)
        config = replace(config, data=replace(config.data, repeats=repeats))
        build.log_plan(config, mae.make_task(config, Run(ALONE)), ALONE)
        return capsys.readouterr().out

    usual = logged()
    assert "10 steps = 3 epochs" in usual and "rounded up" not in usual
    assert "times the training data" not in usual and "rises to the very end" not in usual
    assert "11 steps = 3.1 epochs, rounded up" in logged(epochs=3.1)
    assert "4 steps = 1 epoch, rounded up" in logged(epochs=1.0)
    assert "; 1 step = 0.3 epochs" in logged(epochs=0.3)
    assert "a batch is 1.5 times the training data: lower optim.batch to at most 40 " in logged(batch=60)
    assert "times the training data" not in logged(repeats=2, batch=60), "30 of the 40 samples, twice each"
    assert "1.2 times the training data: lower optim.batch to at most 80 " in logged(repeats=2, batch=96)
    assert "warmup takes 3 epochs: the learning rate rises to the very end" in logged(warmup_epochs=3.0)


def test_the_reference_protocol_has_its_clip_starts_and_label(clips, tmp_path):
    config = small("video-ft-pico", clips, tmp_path, "reference", epochs=1.0)
    reference = {"clip_start": 10, "eval_clip_start": 40, "eval_split": "train"}
    config = replace(config, data=replace(config.data, stride=1, **reference))
    dataset = open_dataset(clips, "train")
    ids, epochs = np.arange(20), np.arange(20)
    frames = train_rows(dataset, config.data, 0, ids, epochs).frames
    assert np.array_equal(frames, np.tile(np.arange(10, 18), (20, 1)))
    # The clips have 20 frames, so a window cannot start at frame 40.
    frames = eval_rows(dataset, config.data, (1, 1), ids, ids >= 0).frames
    assert np.array_equal(frames, np.tile(np.arange(12, 20), (20, 1)))
    run = fit(config, finetune.make_task)
    assert read_csv(run / "metrics.csv")[-1]["held_out"] == 0
    assert len(pq.read_table(run / "predictions.parquet")) == 20
    assert "nothing is held out" in (run / "log.txt").read_text()
    usual = fit(small("video-ft-pico", clips, tmp_path, "usual", epochs=1.0), finetune.make_task)
    assert read_csv(usual / "metrics.csv")[-1]["held_out"] == 1


def test_evaluating_weights_of_another_kind_is_refused(images, tmp_path):
    run = fit(small("image-ft-pico", images, tmp_path, "run", epochs=1.0), finetune.make_task)
    torch.save(pico().state_dict(), tmp_path / "three-classes.pt")
    with pytest.raises(UserError, match="of another kind of model or other classes"):
        evaluate.evaluate(evaluate.Arguments(run, weights=tmp_path / "three-classes.pt", device="cpu"))


def test_checkpoints_are_written_in_the_background_and_a_full_disk_is_reported(tmp_path, monkeypatch):
    writer = checkpoint.Writer(tmp_path / "checkpoints", keep=2)
    weights = torch.ones(3)
    writer.save(1, {"model": {"w": weights}, "groups": [{"lr": 0.5}]})
    weights.zero_()  # later training steps must not change what is being saved
    writer.wait()
    state = checkpoint.load(tmp_path / "checkpoints/step-000000001.pt", CPU)
    assert state["model"]["w"].tolist() == [1, 1, 1]
    assert state["groups"] == [{"lr": 0.5}]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    writer.save(2, {})
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        writer.wait()
    assert checkpoint.choose(tmp_path / "checkpoints") is not None


def test_a_checkpoint_that_fails_ends_the_run_at_the_next_row(images, tmp_path, monkeypatch):
    """Not at the next checkpoint, which may be hours later."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    config = small("image-mae-pico", images, tmp_path, "run", epochs=9.0)
    config = replace(config, run=replace(config.run, log_every=1, checkpoint_every=5, eval_every=100))
    with pytest.raises(UserError, match=r"no checkpoint can be written to .* free some space"):
        fit(config, mae.make_task)
    steps = [row["step"] for row in read_csv(tmp_path / "run/metrics.csv")]
    assert 5 <= steps[-1] < 10


# ---- compilation and the screen --------------------------------------------------------------------------


class Breaks(nn.Module):
    """A model that does not compile as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.layer(x.movedim(1, -1))


def test_a_model_that_does_not_compile_is_trained_uncompiled(capsys):
    config = FINETUNE_PRESETS["image-ft-pico"]
    config = replace(config, speed=replace(config.speed, compile="yes"))
    model = NormalizedInput(Breaks(), frames=1)
    pixels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    build.compile_model(model, config.speed, CPU, lambda: model(pixels).sum())
    output = capsys.readouterr().out
    assert output.startswith("torch.compile: FAILED") and "training continues without it" in output
    assert model(pixels).shape == (2, 4, 4, 1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_screen_shows_a_loss_curve():
    assert curve([3.0, 2.0, 1.0]) == "█▅▁" and curve([1.0, 1.0]) == "▁▁"


# ---- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [pytest.param("image-mae-pico", marks=LONG), "video-ft-pico"])
def test_training_overfits_sixteen_samples(preset, images, clips, tmp_path):
    """The training loss gets close to zero."""
    video, pretraining = "video" in preset, "mae" in preset
    config = small(preset, clips if video else images, tmp_path, "heart", warmup_epochs=0.5)
    data = replace(config.data, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, size=32 if video else 64)
    catalogue = open_dataset(config.data.path, "train")
    model = replace(config.model, drop_path=0.0)
    config = replace(config, data=replace(data, augment=Augment()), model=model)
    config = replace(
        config, optim=replace(config.optim, batch=16), speed=replace(config.speed, micro_batch=16)
    )
    if not pretraining:
        config = replace(config, smoothing=0.0)
    task = (mae if pretraining else finetune).make_task(config, Run(ALONE))
    batches = build.training_batches(config, ALONE, catalogue, 1, 0)
    batch = next(batches)
    ready = NormalizedInput(task.model, config.data.frames).train()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-3 if pretraining else 5e-4, fused=True)
    losses = []
    for _ in range(170 if pretraining else 40):
        loss = task.loss(ready, batch)
        loss.backward()
        optim.update(task.model, optimizer, clip_norm=1.0)
        losses.append(loss.item())
    assert losses[-1] < (0.5 * losses[0] if pretraining else 0.05), losses[:: len(losses) // 8]
