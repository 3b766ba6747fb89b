"""Health of the features: the numbers equal their formulas; a stage that really collapses is reported."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.layers import NormalizedInput
from pipelines.dataset import open_dataset
from pipelines.machine import World
from tests.train_helpers import small
from train import health, loop, mae
from train.config import MaeConfig
from train.metrics import HEALTH_COLUMNS, read_csv
from train.rundir import Run


def settings(images: Path, root: Path, name: str) -> MaeConfig:
    config = small("image-mae-pico", images, root, name, epochs=0.6)
    assert isinstance(config, MaeConfig)
    return replace(config, health=True, run=replace(config.run, eval_every=1, log_every=1))


@pytest.fixture(scope="module")
def healthy(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps with an evaluation after each."""
    config = settings(images, tmp_path_factory.mktemp("runs"), "healthy")
    assert loop.fit(config, mae.make_task) == 0
    return config.run.folder


def test_the_effective_rank_counts_equal_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 7)).Q
    assert health.effective_rank(basis @ torch.eye(7, 30)) == pytest.approx(7)
    assert health.effective_rank(torch.ones(20, 5) * 3) == pytest.approx(1)
    shares = torch.tensor([0.5, 0.25, 0.25])
    entropy = -sum(share * math.log(share) for share in shares.tolist())
    assert health.effective_rank(torch.diag(shares)) == pytest.approx(math.exp(entropy))
    assert health.effective_rank(torch.zeros(4, 4)) == 1
    assert math.isnan(health.effective_rank(torch.tensor([[1.0, float("nan")]])))


def test_the_deviation_is_one_without_a_mean_and_zero_for_equal_samples():
    torch.manual_seed(0)
    half = torch.randn(50, 8)
    assert health.deviation(torch.cat([half, -half])) == pytest.approx(1)
    assert health.deviation(5 * torch.ones(6, 3)) == pytest.approx(0, abs=1e-6)
    assert health.deviation(torch.zeros(6, 3)) == 0


def test_every_evaluation_of_a_healthy_run_has_all_columns_and_no_warning(healthy: Path):
    rows = read_csv(healthy / "metrics.csv")
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(row[column]) for column in HEALTH_COLUMNS)
        assert all(2 < row[f"health_rank_stage{n}"] <= 14 for n in range(1, 5))
        assert all(0.05 < row[f"health_std_stage{n}"] <= 1 for n in range(1, 5))
        assert row["health_probe"] > 0.8  # the classes are dark and bright
    assert "have collapsed" not in (healthy / "log.txt").read_text()


def test_a_stage_without_weights_is_reported(healthy: Path, images: Path, tmp_path: Path):
    weights = load_file(healthy / "model.safetensors")
    for name, values in weights.items():
        if re.match(r"blocks\.[3-6]\.", name):  # the pico model's stage 3
            values.zero_()
    save_file(weights, tmp_path / "zero.safetensors")
    config = settings(images, tmp_path, "collapsed")
    config = replace(config, model=replace(config.model, init=str(tmp_path / "zero.safetensors")))
    assert loop.fit(config, mae.make_task) == 0
    row = read_csv(config.run.folder / "metrics.csv")[0]
    log = (config.run.folder / "log.txt").read_text()
    assert row["health_std_stage3"] < 0.05 < row["health_std_stage2"]
    assert "the features of stage 3 (" in log and "stage 2" not in log


def test_a_stage_that_loses_half_of_its_deviation_is_reported(
    healthy: Path, images: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    config = settings(images, healthy.parent, "again")
    task = mae.make_task(config, Run(World(0, 1, torch.device("cpu"))))
    parts = health.fixed_parts(open_dataset(images, "train"), open_dataset(images, "val"))
    model, history = NormalizedInput(task.model, 1), health.History()
    capsys.readouterr()
    world = World(0, 1, torch.device("cpu"))
    first = health.measure(config, world, parts, history, model, lambda: None)
    assert history.highest == [first[f"health_std_stage{n}"] for n in range(1, 5)]
    assert "have collapsed" not in capsys.readouterr().out
    history.highest[1] *= 2.1
    health.measure(config, world, parts, history, model, lambda: None)
    printed = capsys.readouterr().out
    assert re.findall(r"stage (\d) \(effective", printed) == ["2"] and "a linear probe of" in printed
    health.measure(config, world, parts, history, model, lambda: None)
    assert "have collapsed" not in capsys.readouterr().out, "each stage is reported once"
    history.warned.clear()
    monkeypatch.setattr(health, "FEWEST", 15)  # the split has 14 samples
    health.measure(config, world, parts, history, model, lambda: None)
    assert "have collapsed" not in capsys.readouterr().out


def test_a_part_has_evenly_spaced_samples_and_their_frames(images: Path, monkeypatch: pytest.MonkeyPatch):
    whole = open_dataset(images, "train")
    counts, ids = np.array([2, 1, 3, 1, 4]), np.array([0, 2, 4])
    first = np.concatenate([[0], np.cumsum(counts)])
    columns = {name: getattr(whole, name)[:5] for name in ("shard", "label", "width", "height")}
    columns |= {name: getattr(whole, name)[:11] for name in ("offset", "size", "crc")}
    clips = replace(whole, first_frame=first, **columns)
    part = health.fixed_part(clips, 3)
    assert part.frame_counts(np.arange(3)).tolist() == [2, 3, 4]
    assert part.offset.tolist() == clips.offset[[0, 1, 3, 4, 5, 7, 8, 9, 10]].tolist()
    assert part.label.tolist() == clips.label[ids].tolist()
    monkeypatch.setattr(health, "CLASSES", 1)
    assert set(health.fixed_part(whole, 3).label.tolist()) == {0}


@pytest.mark.parametrize(("per_class", "fitted"), [(1, 14), (16, 32), (100, 40)])
def test_a_small_evaluation_split_needs_few_training_samples(
    images: Path, monkeypatch: pytest.MonkeyPatch, per_class: int, fitted: int
):
    monkeypatch.setattr(health, "PER_CLASS", per_class)  # the splits have 40 and 14 samples, of 2 classes
    parts = health.fixed_parts(open_dataset(images, "train"), open_dataset(images, "val"))
    assert [len(part) for part in parts] == [fitted, 14]
