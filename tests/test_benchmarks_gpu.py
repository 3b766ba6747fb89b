"""make gpu-check on the CPU: its checks run, and failures become rows of the table."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_checks, gpu_models, gpu_runs
from benchmarks.gpu_checks import Place
from tests.test_project import call_make
from train import console
from train.presets import MAE_PRESETS

RATES = {
    "steps of image-mae-base (samples/s)": {
        "micro 64, flash": 800.0,
        "micro 128, flash": 990.0,
        "micro 256, cuDNN": 1000.0,
        "micro 64, upstream": 5000.0,
    },
    "loading pictures (pictures/s)": {
        "4 threads, engine share 0.65, whole": 900.0,
        "12 threads, engine share 0.9, whole": 1200.0,
    },
    "loading pictures by windows (pictures/s)": {"12 threads, engine share 0.65, window": 1100.0},
}
FLAGS = (
    "--speed.attention flash --speed.micro-batch 128 --speed.threads 12 --speed.hw-decoder-load 0.9 "
    "--speed.decode whole"
)


@pytest.fixture
def place(images: Path, clips: Path, tmp_path: Path) -> Place:
    return Place(torch.device("cpu"), images, clips, tmp_path)


@pytest.mark.parametrize(
    "check",
    [
        gpu_checks.machine,
        gpu_checks.whole_decoding,
        gpu_checks.windows,
        gpu_checks.region_decoding,
        gpu_checks.order_independence,
        gpu_checks.buffer_lifetime,
        gpu_checks.hostile_pictures,
        gpu_models.augmentations,
        gpu_models.random_draws,
        gpu_models.models_fp32,
        gpu_models.models_bf16,
    ],
    ids=lambda check: check.__name__,
)
def test_a_check_passes_on_the_cpu(place: Place, check):
    assert check(place)


def test_a_check_finds_other_pixels(place: Place, monkeypatch: pytest.MonkeyPatch):
    decode = gpu_checks.decode
    shift = iter((0, 9))
    monkeypatch.setattr(
        gpu_checks, "decode", lambda *words: [p // 2 + next(shift) for p in decode(*words)[:1]]
    )
    with pytest.raises(gpu_checks.Problem, match=r"differs by 9\.00 levels"):
        gpu_checks.whole_decoding(place)


def test_a_hang_becomes_a_row(place: Place):
    row = gpu_check.run("machine", place, 0)
    assert row.state == gpu_check.FAILED and "no answer after 0 s" in str(row.found)


def test_a_crash_becomes_a_row(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho decoding\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crash))
    row = gpu_check.run("machine", place, 60)
    assert (row.state, row.found) == (gpu_check.FAILED, "signal 11: decoding")


def test_checks_that_need_gpus_are_marked(place: Place):
    states = {
        name: gpu_check.row_of(name, check, place, 0).state
        for name, check in gpu_check.CHECKS.items()
        if check.gpus
    }
    assert states["whole decoding"] == "needs a GPU" and states["ranks end together"] == "needs two GPUs"


def test_settings_are_the_smallest_micro_batch_near_the_best_and_training_accepts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = gpu_check.recommended(RATES)
    assert {recipe: " ".join(words) for recipe, words in flags.items()} == {"image-mae-base": FLAGS}
    row = gpu_check.Row("machine", "ok", "fine")
    gpu_check.write([row], flags, "cpu", tmp_path, gpu_check.Console(quiet=True))
    (path,) = tmp_path.glob("*-cpu-gpu-check.json")
    assert json.loads(path.read_text())["checks"]["machine"]["state"] == "ok"
    command = call_make("-n", "train-mae", f"TUNED={tmp_path / 'tuned-image-mae-base.txt'}").splitlines()[-1]
    words = shlex.split(command.partition("train.mae ")[2])
    monkeypatch.setattr("sys.argv", ["train.mae", *words])
    speed = console.parse(MAE_PRESETS, "train.mae").speed
    assert (speed.micro_batch, speed.threads, speed.hw_decoder_load) == (128, 12, 0.9)
    assert (speed.attention, speed.decode) == ("flash", "whole")


def test_cudnn_and_windows_are_recommended_if_they_are_faster():
    rates = {"micro 64, flash": 900.0, "micro 64, cuDNN": 950.0, "micro 128, cuDNN": 960.0}
    assert gpu_check.step_flags(rates) == ["--speed.attention", "cudnn", "--speed.micro-batch", "64"]
    loading = {"8 threads, engine share 0.65, whole": 1.0, "12 threads, engine share 0.65, window": 2.0}
    assert gpu_check.loading_flags(loading)[-1] == "window"


def test_data_is_generated_for_pictures_and_clips(tmp_path: Path):
    gpu_runs.draw_frames(tmp_path / "a" / "{}.jpg", (0, 1), 3)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]
