"""make gpu-check on the CPU: its checks run, and failures become rows of the table."""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_checks, gpu_models, gpu_runs
from benchmarks.gpu_place import Place, Problem
from pipelines.errors import UserError
from tests.test_project import call_make
from train import console
from train.build import ATTENTION
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


def test_models_are_checked_with_the_attention_that_training_uses(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    """PyTorch would choose cuDNN's attention on an H100; training does not allow it by default."""
    allowed, compute = [], gpu_models.loss_and_norm

    def noting(*arguments, **options):
        cuda = torch.backends.cuda
        allowed.append((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()))
        return compute(*arguments, **options)

    monkeypatch.setattr(gpu_models, "loss_and_norm", noting)
    gpu_models.models_bf16(place)
    assert allowed[1::2] == [ATTENTION["auto"]] * 2  # every second one is the CPU's, which is compared


def test_a_check_finds_other_pixels(place: Place, monkeypatch: pytest.MonkeyPatch):
    decode = gpu_checks.decode
    shift = iter((0, 9))
    monkeypatch.setattr(
        gpu_checks, "decode", lambda *words: [p // 2 + next(shift) for p in decode(*words)[:1]]
    )
    with pytest.raises(Problem, match=r"differs by 9\.00 levels"):
        gpu_checks.whole_decoding(place)


def test_a_hang_becomes_a_row(place: Place):
    row = gpu_check.run("machine", place, 0)
    assert row.state == gpu_check.FAILED and "no answer after 0 s" in str(row.found)


def replace_python(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Run a shell script instead of a check."""
    (folder / "python").write_text(f"#!/bin/sh\n{script}")
    (folder / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(folder / "python"))


def test_a_crash_becomes_a_row(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    replace_python(monkeypatch, tmp_path, "echo decoding\nkill -SEGV $$\n")
    row = gpu_check.run("machine", place, 60)
    assert (row.state, row.found) == (gpu_check.FAILED, "signal 11: decoding")


def test_processes_that_a_check_leaves_behind_are_killed_and_delay_no_row(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The process has a session of its own, as torchrun's have, and keeps the check's output open."""
    orphan = tmp_path / "orphan"
    replace_python(monkeypatch, tmp_path, f"setsid sh -c 'echo $$ > {orphan}; exec sleep 60' &\nsleep 2\n")
    begin = time.monotonic()
    row = gpu_check.run("machine", place, 30)
    assert row.state == gpu_check.FAILED and time.monotonic() - begin < 30
    assert not Path(f"/proc/{orphan.read_text().strip()}").exists()


def test_a_hang_shows_where_the_inner_process_was(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A check waits for a training that hangs: the row names the training's line."""
    hang = "import time\nprint('step 3', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "hang.py").write_text(hang)
    replace_python(
        monkeypatch, tmp_path, f'printed=$({sys.executable} {tmp_path}/hang.py 2>&1)\necho "$printed"\n'
    )
    row = gpu_check.run("machine", place, 5)
    assert row.found == f'no answer after 5 s: step 3 File "{tmp_path}/hang.py", line 3 in <module>'
    assert "Fatal Python error: Aborted" in row.printed


def test_checks_that_need_gpus_are_marked(place: Place):
    states = {
        name: gpu_check.row_of(name, check, place, 0, 1.0).state
        for name, check in gpu_check.CHECKS.items()
        if check.gpus
    }
    assert states["whole decoding"] == "needs a GPU" and states["ranks end together"] == "needs two GPUs"


def test_settings_are_the_smallest_micro_batch_near_the_best_and_training_accepts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = gpu_check.recommended(RATES)
    assert {recipe: " ".join(words) for recipe, words in flags.items()} == {"image-mae-base": FLAGS}
    rows = [gpu_check.Row("machine", "ok", "fine"), gpu_check.Row("no", gpu_check.FAILED, "", printed="why")]
    results = gpu_check.Results(tmp_path, "cpu", 0)
    results.write(rows, flags)
    results.write_settings(flags)
    (path,) = tmp_path.glob("*-cpu-gpu-check.json")
    checks = json.loads(path.read_text())["checks"]
    assert checks["machine"]["state"] == "ok" and checks["no"]["output"] == "why"
    command = call_make("-n", "train-mae", f"TUNED={tmp_path / 'tuned-image-mae-base.txt'}").splitlines()[-1]
    words = shlex.split(command.partition("train.mae ")[2])
    monkeypatch.setattr("sys.argv", ["train.mae", *words])
    speed = console.parse(MAE_PRESETS, "train.mae").speed
    assert (speed.micro_batch, speed.threads, speed.hw_decoder_load) == (128, 12, 0.9)
    assert (speed.attention, speed.decode) == ("flash", "whole")


def test_without_rates_of_flash_and_of_loading_nothing_is_recommended():
    """A check of some rows only would replace the settings of a whole one."""
    steps, loading, _ = RATES
    by_cudnn = {"steps of image-mae-base by cuDNN (samples/s)": {"micro 64, cuDNN": 950.0}}
    assert gpu_check.recommended({steps: RATES[steps]}) == {}
    assert gpu_check.recommended({loading: RATES[loading]} | by_cudnn) == {}


def test_cudnn_and_windows_are_recommended_if_they_are_faster():
    loading = {"8 threads, engine share 0.65, whole": 1.0, "12 threads, engine share 0.65, window": 2.0}
    rates = {
        "loading clips (frames/s)": loading,
        "steps of video-ft-base (samples/s)": {"micro 64, flash": 900.0},
        "steps of video-ft-base by cuDNN (samples/s)": {"micro 64, cuDNN": 950.0, "micro 128, cuDNN": 960.0},
    }
    (flags,) = gpu_check.recommended(rates).values()
    assert flags[:4] == ["--speed.attention", "cudnn", "--speed.micro-batch", "64"] and flags[-1] == "window"


def test_data_is_generated_for_pictures_and_clips(tmp_path: Path):
    gpu_runs.draw_frames(tmp_path / "a" / "{}.jpg", (0, 1), 3)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]


def test_a_folder_for_results_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch):
    """The checks take minutes."""
    monkeypatch.setattr(gpu_check, "run", lambda *_: pytest.fail("a check ran"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^{tmp_path}/file/x cannot be written to \(Not a directory\); "):
        gpu_check.gpu_check("cpu", tmp_path / "file/x")


def test_an_interrupted_gpu_check_keeps_its_rows_and_those_of_earlier_ones(tmp_path: Path, monkeypatch):
    """A machine's time may end before the checks do."""

    def end_at_windows(name: str, *_):
        if name == "windows by slicing":
            raise KeyboardInterrupt
        return gpu_check.Row(name, "ok", "cpu")

    earlier = tmp_path / "2026-01-01-000000-cpu-gpu-check.json"
    earlier.write_text("{}")
    monkeypatch.setattr(gpu_check, "run", end_at_windows)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.gpu_check("cpu", tmp_path)
    (path,) = set(tmp_path.iterdir()) - {earlier}
    content = json.loads(path.read_text())
    assert list(content["checks"]) == ["data", "machine", "whole decoding"] and earlier.read_text() == "{}"
    assert content["device"] == "cpu" and content["environment"]["packages"]["torch"]


def test_one_check_or_training_can_be_repeated():
    assert gpu_check.is_wanted("image-mae-base", ()) and gpu_check.is_wanted("image-mae-base", ("mae",))
    assert not gpu_check.is_wanted("image-mae-base", ("whole decoding",))


def test_sigterm_ends_the_check_that_runs(monkeypatch: pytest.MonkeyPatch):
    """Its process has a session of its own, so that nothing else would end it."""

    def command(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    monkeypatch.setattr(gpu_check.tyro, "cli", command)
    try:
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143


def test_a_training_whose_compilation_failed_is_no_compiled_rate(place: Place, monkeypatch):
    """Training then continues without it."""
    row = {"samples_per_s": "9", "max_mem_gb": "1", "data_wait_ms": "1", "step_ms": "2", "mfu": "0.5"}
    monkeypatch.setattr(gpu_runs, "rows_of", lambda *_: [row])
    monkeypatch.setattr(gpu_runs, "run", lambda *_: "torch.compile: on, ready after 9 s")
    flags = ["--speed.micro-batch", "64"]
    assert gpu_runs.training_rates("image-ft-base", place, flags)["MFU (%)"] == 50
    monkeypatch.setattr(gpu_runs, "run", lambda *_: "torch.compile: FAILED (no gcc); training continues")
    with pytest.raises(Problem, match=r"torch\.compile: FAILED \(no gcc\).*'samples/s': 9\.0"):
        gpu_runs.training_rates("image-ft-base", place, flags)
