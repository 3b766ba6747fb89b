"""The number of steps, the warmup and the learning rate of every step equal independent formulas."""

import json
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from torch import nn

import models
from tests.pipelines_fixtures import image_dataset
from tests.train_helpers import small
from tools.compare import state
from train import build, finetune, optim
from train.config import OptimConfig, to_dict
from train.distributed import World
from train.presets import FINETUNE_PRESETS, MAE_PRESETS
from train.rundir import Run

PRESETS = {**MAE_PRESETS, **FINETUNE_PRESETS}
IMAGENET, KINETICS = 1_281_167, 240_000  # training samples


# ---- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "warmup_epochs", "steps", "warmup"),
    [
        (400, 96, 30.0, 5.0, 125, 21),  # 30 * (400 / 96) is 125.00000000000001 in floating point
        (IMAGENET, 4096, 400.0, 40.0, 125_114, 12_511),
        (IMAGENET, 1024, 50.0, 5.0, 62_557, 6256),
        (10, 4, 0.7, 0.7, 2, 2),  # 1.75 steps
        (10, 1, 0.7, 0.1, 7, 1),
        (3, 1000, 1.0, 1.0, 1, 0),
        (49, 7, 0.1, 5.0, 1, 1),  # warmup is never longer than the run
        (1, 1, 1e-9, 0.0, 1, 0),
        (4_000_000_000, 96, 3200.0, 120.0, 133_333_333_334, 5_000_000_000),
    ],
)
def test_steps_are_counted_exactly(samples, batch, epochs, warmup_epochs, steps, warmup):
    settings = OptimConfig(batch=batch, epochs=epochs, warmup_epochs=warmup_epochs)
    assert optim.total_steps(settings, samples) == steps
    assert optim.warmup_steps(settings, samples) == warmup


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "interval"),
    [
        (IMAGENET, 4096, 40, 313),  # one epoch
        (IMAGENET, 4096, 400, 1252),  # 100 evaluations, one every 4 epochs
        (IMAGENET, 1024, 10, 1251),  # one epoch: 10 evaluations, the last one at the end of the tenth
        (270, 32, 10, 8),  # 85 steps of 8.4 to an epoch: 11 evaluations, the last one at the end
        (270, 32, 3, 2),  # 26 steps: at least 10 evaluations
        (60, 12, 1, 1),  # fewer steps than 10
        (100, 1000, 100, 1),  # an epoch is less than a step
    ],
)
def test_a_run_is_evaluated_once_per_epoch_at_least_10_and_at_most_100_times(
    samples: int, batch: int, epochs: float, interval: int
):
    assert optim.eval_interval(OptimConfig(batch=batch, epochs=epochs), samples) == interval


def test_no_length_has_fewer_than_10_or_more_than_100_evaluations():
    for steps in range(10, 320):
        for epoch in (1, 2, 3, 7, 11, 50, 300):  # steps
            settings = OptimConfig(batch=1, epochs=steps / epoch, warmup_epochs=0.0)
            length = optim.total_steps(settings, epoch)
            assert 10 <= math.ceil(length / optim.eval_interval(settings, epoch)) <= 100, (length, epoch)


def test_steps_are_the_smallest_number_that_covers_the_epochs():
    for samples in (1, 7, 96, 400, 1000):
        for batch in (1, 3, 64, 96):
            for tenths in (1, 3, 7, 10, 30, 300):
                settings = OptimConfig(batch=batch, epochs=tenths / 10, warmup_epochs=1.0)
                steps = optim.total_steps(settings, samples)
                assert 10 * (steps - 1) * batch < tenths * samples <= 10 * steps * batch
                exact = min(Fraction(samples, batch), steps)
                assert abs(optim.warmup_steps(settings, samples) - exact) <= Fraction(1, 2)


# ---- learning rate ---------------------------------------------------------------------------------------


def pico(layers: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return models.create("hiera_pico_96" if layers else "mae_hiera_pico_96")


def expected(settings: OptimConfig, samples: int, step: int) -> float:
    """The learning rate of the head at `step` (0: the first), from the definition."""
    steps = math.ceil(Decimal(str(settings.epochs)) * samples / settings.batch)
    warmup = min(round(Decimal(str(settings.warmup_epochs)) * samples / settings.batch), steps)
    peak = settings.lr * settings.batch / settings.lr_batch
    if step < warmup:
        return peak * step / warmup
    turn = math.pi * (step - warmup) / (steps - warmup)
    return settings.min_lr + (peak - settings.min_lr) * (1 + math.cos(turn)) / 2


@pytest.mark.parametrize(
    ("preset", "samples", "changes"),
    [
        ("image-mae-base", IMAGENET, {}),
        ("video-mae-base", KINETICS, {}),
        ("video-mae-huge", KINETICS, {}),
        ("image-ft-base", IMAGENET, {}),
        ("video-ft-large", KINETICS, {"min_lr": 1e-6}),
        ("image-ft-base", IMAGENET, {"batch": 256, "min_lr": 1e-5}),  # scaled to a quarter
        ("image-ft-base", 30_000, {"warmup_epochs": 0.0}),
        ("image-ft-base", 30_000, {"epochs": 3.0, "warmup_epochs": 3.0}),
        ("image-ft-base", 30_000, {"epochs": 3.0, "warmup_epochs": 20.0}),
        ("image-ft-base", 30_000, {"epochs": 3.0, "warmup_epochs": 2.98}),
        ("image-ft-base", 1024, {"epochs": 1.0, "warmup_epochs": 0.0}),  # one step
        ("image-ft-base", 1024, {"epochs": 1.0, "warmup_epochs": 1.0}),
        ("image-ft-base", 1024, {"epochs": 2.0, "warmup_epochs": 1.0}),
        ("image-ft-base", 1024, {"epochs": 3.0, "warmup_epochs": 1.0}),
        ("video-ft-tiny-kinetics-reference", 400, {}),
    ],
)
def test_the_rate_of_every_group_follows_the_formula_at_every_step(preset, samples, changes):
    settings = replace(PRESETS[preset].optim, **changes)
    optimizer = optim.make_optimizer(pico(layers="-ft-" in preset), settings)
    steps = optim.total_steps(settings, samples)
    warmup = optim.warmup_steps(settings, samples)
    near = {*range(5), *range(warmup - 3, warmup + 4), *range(steps - 4, steps)}
    chosen = sorted(step for step in near | set(range(0, steps, max(1, steps // 50))) if 0 <= step < steps)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert (len(scales) > 3) == (settings.layer_decay < 1)
    for step in chosen:
        optim.set_learning_rate(optimizer, settings, step, samples)
        for group in optimizer.param_groups:
            wanted = group["lr_scale"] * expected(settings, samples, step)
            assert group["lr"] == pytest.approx(wanted, rel=1e-9, abs=1e-18), step


@pytest.mark.parametrize(("preset", "samples"), [("image-mae-base", IMAGENET), ("video-mae-base", KINETICS)])
def test_the_rate_is_highest_at_the_end_of_warmup_and_then_decreases_smoothly(preset, samples):
    settings = PRESETS[preset].optim
    optimizer = optim.make_optimizer(pico(), settings)
    warmup, steps = optim.warmup_steps(settings, samples), optim.total_steps(settings, samples)

    def rate(step: int) -> float:
        optim.set_learning_rate(optimizer, settings, step, samples)
        return max(group["lr"] for group in optimizer.param_groups)

    full = optim.scaled_lr(settings)
    assert rate(0) == 0 and rate(warmup) == pytest.approx(full, rel=1e-12)
    assert rate(warmup - 1) == pytest.approx(full * (1 - 1 / warmup), rel=1e-9)
    assert rate(warmup + 1) == pytest.approx(full, rel=1e-6)
    middle = (warmup + steps) / 2
    assert rate(math.floor(middle)) + rate(math.ceil(middle)) == pytest.approx(full, rel=1e-9)
    assert 0 < rate(steps - 1) < 1e-8 * full * 100


def test_all_commands_compute_the_same_number_of_steps(tmp_path, capsys):
    """400 samples, batch 96, 30 epochs: the plan and the report show 125 steps, without rounding errors."""
    data = image_dataset(tmp_path / "data", 400, size=(8, 8))
    config = small("image-ft-pico", data, tmp_path, "run", batch=96, epochs=30.0)
    world = World(0, 1, torch.device("cpu"))
    build.log_plan(config, finetune.make_task(config, Run(world)), world)
    plan = capsys.readouterr().out
    assert "125 steps = 30 epochs" in plan and "rounded up" not in plan
    folder = config.run.folder
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "data.json").write_text(json.dumps({"splits": {"train": {"samples": 400}}}))
    (folder / "metrics.csv").write_text("time,step\n1,7\n")
    assert "not finished: 7 of 125 steps" in state(folder)
