"""The training code on an imitated CUDA runtime: what can be proved without a GPU.

The runtime imitates; it never measures. No figure from it may appear as a GPU figure. tests/fakegpu/README.md
lists what it shows. Two groups of child processes run everything, because importing torch takes seconds.
"""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from nvidia.dali.pipeline import Pipeline

from benchmarks import gpu_check
from pipelines import decode
from pipelines.config import DataConfig, DecodeConfig
from tests.fakegpu import build, child
from tests.train_helpers import ROOT

TRAININGS = (
    "mae_rows",
    "finetune_all",
    "checkpointed_half_decoded_sgd_tf32",
    "frozen_abs_win",
    "clips_many_views",
)
SHOWN = (  # checks that compare no numbers
    "data",
    "machine",
    "rows equal detail",
    "no waits",
    "resume and stop",
    "out of memory",
    "ranks end together",
)
Lines = dict[str, dict]  # scenario -> what it found


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a child process that uses the imitated runtime, which is built here."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: make gpu-check tests on it")
    if missing := [tool for tool in ("g++", "gcc", "nm") if shutil.which(tool) is None]:
        pytest.skip(f"{missing[0]} is not installed, which builds the imitated runtime")
    return build.build(tmp_path_factory.mktemp("fakegpu"))


def start(runtime: dict[str, str], folder: Path, names: tuple[str, ...], *words: Path, **more: str):
    """A child process that runs the scenarios; it writes `folder`/log and `folder`/report."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.fakegpu.child",
        folder / "report",
        *words,
        folder.parent / "runs",
        *names,
    ]
    env = os.environ | runtime | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
        )


def lines_of(folder: Path, begins: bool = False) -> Lines:
    path = folder / "report"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {line["scenario"]: line for line in lines if line.get("begins", False) == begins}


def found(lines: Lines, name: str, folder: Path) -> dict:
    """What a scenario found; fails with the end of the log if it did not end."""
    assert name in lines, (folder / "log").read_text()[-1500:]
    assert lines[name]["error"] == "", lines[name]["error"]
    return lines[name]


@pytest.fixture(scope="module")
def alone(runtime, images: Path, clips: Path, tmp_path_factory) -> tuple[Lines, Path, int]:
    """One process: what the scenarios found, its folder, its exit code."""
    folder = tmp_path_factory.mktemp("alone") / "0"
    names = ("controls", *TRAININGS, "resume", "launches", "compiled_draws", "out_of_memory")
    caches = {name: str(folder.parent / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    caches["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    code = start(runtime, folder, names, images, clips, **caches).wait(timeout=600)
    return lines_of(folder), folder, code


def test_the_runtime_shows_early_reads_waits_and_impossible_launches(alone):
    lines, folder, _ = alone
    seen = found(lines, "controls", folder)
    assert seen["early"] and seen["late"] == [0.0] * 4
    assert "synchronizing" in seen["waited"]
    assert "invalid configuration" in seen["refusal"] and seen["refused"] == 1
    assert seen["uploaded"] == [1.0] * 4 and seen["written"] == [0.0] * 4


def test_metric_rows_are_read_after_their_copy(alone):
    lines, folder, _ = alone
    found(lines, "mae_rows", folder)
    run = folder.parent / "runs/rows"
    rows = {row["step"]: row for row in csv.DictReader((run / "metrics.csv").open())}
    (path,) = (run / "detail").glob("*.csv")
    details = {row["step"]: row for row in csv.DictReader(path.open())}
    assert rows.keys() == details.keys() and len(rows) == 10
    for step, row in rows.items():
        assert float(row["loss_train"]) == float(details[step]["loss"]), step
        assert row["grad_norm"] != "", step


@pytest.mark.parametrize("name", TRAININGS)
def test_no_step_waits_for_the_device_and_no_launch_is_refused(alone, name: str):
    lines, folder, _ = alone
    seen = found(lines, name, folder)
    assert seen["steps"] >= 4
    assert seen["waits"] == []
    assert seen["refused"] == 0


@pytest.mark.parametrize("recipe", child.RECIPES)
def test_no_launch_of_a_base_recipe_is_refused(alone, recipe: str):
    lines, folder, _ = alone
    assert found(lines, "launches", folder)[recipe] == 0


def test_a_run_logs_which_micro_batch_would_fit(alone):
    lines, folder, _ = alone
    found(lines, "mae_rows", folder)
    log = (folder.parent / "runs/rows/log.txt").read_text()
    assert re.search(r"GPU memory: \d+\.\d of 80 GiB at 6 rows per forward; about 12 would fit", log), log
    assert log.count("GPU memory") == 1


def test_a_resumed_run_needs_no_more_memory(alone):
    lines, folder, _ = alone
    seen = found(lines, "resume", folder)
    assert seen["after"] == seen["before"]
    assert seen["loading"] <= 1.1 * seen["before"]


def test_the_random_draws_of_the_models_compile_for_a_gpu(alone):
    """Triton computes products of indices in 32 bits and refuses larger constants in them."""
    lines, folder, _ = alone
    assert found(lines, "compiled_draws", folder)["refused"] == 0


def test_too_little_device_memory_is_one_sentence(alone):
    lines, folder, code = alone
    assert "launches" in lines and "out_of_memory" not in lines
    assert code == 2
    *_, last = (folder / "log").read_text().strip().splitlines()
    assert last.startswith("error: ") and "lower speed.micro_batch (6)" in last


# ---- two processes


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def two(runtime, images: Path, clips: Path, tmp_path_factory):
    """Two nccl processes: what each found, their folder, seconds from the failure to each end, exit codes."""
    folder = tmp_path_factory.mktemp("two")
    names = ("two_ranks", "rank_fails")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORTS"] = " ".join(free_ports(2))
    processes = [
        start(
            runtime, folder / str(rank), names, images, clips, **shared, RANK=str(rank), LOCAL_RANK=str(rank)
        )
        for rank in range(2)
    ]
    limit = time.monotonic() + 400
    while time.monotonic() < limit and "fails" not in lines_of(folder / "1", begins=True):
        time.sleep(0.1)
        if any(process.poll() is not None for process in processes):
            break
    begin, ended, codes = time.monotonic(), [None, None], []
    while None in ended and time.monotonic() < begin + 30:
        time.sleep(0.1)
        for rank, process in enumerate(processes):
            if ended[rank] is None and process.poll() is not None:
                ended[rank] = time.monotonic() - begin
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        codes.append(process.wait())
    return [lines_of(folder / str(rank)) for rank in range(2)], folder, ended, codes


def test_two_nccl_processes_train_evaluate_and_export(two):
    lines, folder, _, _ = two
    for rank in range(2):
        seen = found(lines[rank], "two_ranks", folder / str(rank))
        assert seen["steps"] == 10 and seen["refused"] == 0 and seen["waits"] == []
    run = folder / "runs/ranks"
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["acc"]] == ["5", "10"]
    assert (run / "model.safetensors").exists() and (run / "best.safetensors").exists()


def test_a_failing_rank_prints_its_error_and_all_ranks_end_while_nccl_hangs(two):
    _, folder, ended, codes = two
    assert "fails" in lines_of(folder / "1", begins=True), (folder / "1/log").read_text()[-1500:]
    said = (folder / "1/log").read_text()
    assert "error: THE REASON; WHAT TO DO." in said, f"rank 1 ended after {ended[1]} s"
    assert ended[1] is not None and ended[1] < 15 and codes[1] == 2
    assert ended[0] is not None and ended[0] < 30 and codes[0] != 0


# ---- DALI


@pytest.mark.parametrize("interpolation", sorted(decode.FILTERS))
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_dali_serialises_the_graph_of_a_gpu(interpolation: str, copies: int):
    """Every argument suits the GPU's operators; nothing here asks a driver."""
    data = DataConfig(frames=2, interpolation=interpolation)
    with (
        mock.patch.object(Pipeline, "build"),
        mock.patch.object(decode, "gpu_index", return_value=None),
    ):
        gpu = torch.device("cuda", 0)
        pipeline = decode.Decoder(data, DecodeConfig(threads=2), gpu, 4, copies).pipeline
    text = pipeline.serialize()
    assert b"mixed" in text and b"gpu" in text
    assert text.count(b"Resize") >= copies


# ---- make faults


COMPILED = [*(("90", recipe) for recipe in reversed(child.RECIPES)), ("80", "image-mae-base")]
COMPILED += [("100", "image-mae-base")]


@pytest.mark.fault
@pytest.mark.long
@pytest.mark.parametrize(("capability", "recipe"), COMPILED)
def test_a_recipe_compiles_for_a_gpu(
    runtime, images: Path, clips: Path, tmp_path: Path, capability: str, recipe: str, happened
):
    """Inductor, Triton and ptxas compile a base recipe: once for training, once for evaluation."""
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    more = {"FAKEGPU_CAPABILITY": capability, "RECIPE": recipe, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    process = start(runtime, tmp_path / "0", ("compile_recipe",), images, clips, **caches, **more)
    try:
        assert process.wait(timeout=3000) == 0
    finally:
        process.kill()
    seen = found(lines_of(tmp_path / "0"), "compile_recipe", tmp_path / "0")
    assert seen["graphs"] == 2, seen
    (reason,) = seen["recompiles"]
    assert "GLOBAL_STATE changed: grad_mode" in reason, reason
    assert seen["refused"] == 0 and "FAKEGPU refused" not in (tmp_path / "0/log").read_text()
    happened(f"sm_{capability}: one recompile, for evaluation (grad_mode); {seen['cpu_s']:.0f} s of CPU time")


@pytest.mark.fault
@pytest.mark.long
def test_gpu_check_ends_with_a_row_for_every_check(runtime, tmp_path: Path, happened):
    """make gpu-check ends with a row for every check; training passes on the imitated runtime."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--no-rates", "--patience", "10"]
    path = os.pathsep.join((str(ROOT / "tests/fakegpu/site"), str(ROOT)))
    command += ["--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | runtime | {"PYTHONPATH": path}, check=False)
    (written,) = tmp_path.glob("*-gpu-check.json")
    rows = json.loads(written.read_text())["checks"]
    assert rows.keys() == {"data", *gpu_check.CHECKS}
    failed = {name: rows[name]["found"] for name in SHOWN if rows[name]["state"] != "ok"}
    assert not failed
    happened(f"{len(SHOWN)} checks passed; the others compare numbers, which the runtime does not compute")
