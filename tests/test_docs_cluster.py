"""The scripts for Slurm do what docs/cluster.md says: run here with stand-ins for Slurm's own commands.

Slurm is not available where tests run, so `srun` starts one task and `scancel` signals it as Slurm would;
what the scripts start is real: torchrun, training, packing.
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.zoo import create
from pipelines import machine
from tests.tools.test_pack import image_tree, pack_images, sums
from tests.train_helpers import ROOT, arguments, small
from train.config import OptimConfig
from train.optim import checkpoint_bytes
from train.presets import FINETUNE_PRESETS, MAE_PRESETS
from train.rundir import log_cores

SCRIPTS = ("slurm-train.sh", "slurm-pack.sh")
STANDINS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ > "$NOTES/task"; '
    'echo "${SRUN_CPUS_PER_TASK:-1}" >> "$NOTES/cores"; exec "$@"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" >> "$NOTES/requeued"',
    "scancel": 'kill -TERM "$(cat "$NOTES/task")"',
}

JOB = {
    "SLURM_JOB_ID": os.getpid(),
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_NUM_NODES": 1,
    "SLURM_CPUS_PER_TASK": 64,
}


def slurm(notes: Path, **variables: object) -> dict[str, str]:
    """The environment of a batch script: Slurm's variables, and stand-ins for its commands on PATH."""
    folder = notes / "bin"
    folder.mkdir(exist_ok=True)
    for name, text in STANDINS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    told = {"NOTES": notes, "SLURM_SUBMIT_DIR": ROOT, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return {**os.environ, **{name: str(value) for name, value in told.items()}}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_is_right_bash_and_every_line_is_explained(name):
    subprocess.run(["bash", "-n", ROOT / "docs" / name], check=True)
    asked = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("#SBATCH ")]
    explained = (ROOT / "docs/cluster.md").read_text()
    options = [line.split()[1].partition("=")[0] for line in asked]
    assert len(options) > 6 and all(f"`{option}" in explained for option in options)


@pytest.mark.fault
@pytest.mark.long
def test_training_that_is_warned_saves_and_goes_on_when_queued_again(images, tmp_path):
    """The time limit comes near in mid-run; queued again, the same job finishes the run."""
    config = small("image-mae-pico", images, tmp_path / "runs", "long", epochs=6.0)
    command = ["bash", ROOT / "docs/slurm-train.sh", "train.mae", "image-mae-pico", *arguments(config)]
    env = slurm(tmp_path, **JOB, SLURM_GPUS_ON_NODE=1)
    rows = tmp_path / "runs/long/metrics.csv"
    with subprocess.Popen(command, env=env, stdout=-1, stderr=-2, text=True) as first:
        end = time.monotonic() + 120
        while not (rows.exists() and rows.read_text().count("\n") > 2):
            assert first.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        first.send_signal(signal.SIGUSR1)  # --signal=B:USR1@300
        said = first.communicate(timeout=120)[0]
    assert first.returncode == 128 + signal.SIGUSR1, said
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert not (tmp_path / "runs/long/model.safetensors").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed from step" in again.stdout and (tmp_path / "runs/long/model.safetensors").exists()
    assert (tmp_path / "requeued").read_text().count("\n") == 1, "a finished run is not queued again"


def test_training_that_fails_is_not_queued_again(tmp_path):
    """It had all cores of its node: srun without SRUN_CPUS_PER_TASK would give it one."""
    command = ["bash", ROOT / "docs/slurm-train.sh", "train.mae", "image-mae-pico", "--data.path", "/nowhere"]
    env = slurm(tmp_path, **JOB, GPUS=1)
    failed = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (tmp_path / "cores").read_text() == "64\n"
    assert failed.returncode not in (0, 138) and "/nowhere" in failed.stderr
    assert not (tmp_path / "requeued").exists()


def test_a_job_that_is_warned_while_it_stages_is_requeued(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$@" > "$NOTES/started"\nexec sleep 60\n')
    python.chmod(0o755)
    env = slurm(tmp_path, **JOB, STAGE="/network", TO="/local", PY=python)
    command = ["bash", ROOT / "docs/slurm-train.sh", "train.mae", "image-mae-pico"]
    with subprocess.Popen(command, env=env) as job:
        end = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert job.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 128 + signal.SIGUSR1
    assert (tmp_path / "started").read_text() == "-m tools.stage /network /local\n", "no training"
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"


def test_a_run_prints_its_cores_and_warns_if_a_process_has_one(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "cpu_quotas", lambda _: iter((9.0,)))
    log_cores()
    assert capsys.readouterr().out == "CPU cores per process: 4\n"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    log_cores()
    printed = capsys.readouterr().out
    assert printed.startswith("CPU cores per process: 1\nWARNING: 1 of 1 processes have 1 core: ")


def test_the_page_has_the_size_of_the_checkpoints_of_a_model():
    page = (ROOT / "docs/cluster.md").read_text()
    adamw = OptimConfig()
    for size in ("tiny", "base", "huge"):
        models = []
        for name in (f"mae_hiera_{size}_224", f"hiera_{size}_224"):
            with torch.device("meta"):
                models.append(create(name))
        sizes = [checkpoint_bytes(model, replace(adamw, ema=ema)) for model in models for ema in (0.0, 0.9)]
        assert f"| `{size}` | {' | '.join(f'{one / 1e9:.2f}' for one in sizes)} |" in page


def test_the_page_has_the_samples_per_gpu_of_the_recipes():
    page = (ROOT / "docs/cluster.md").read_text()
    rows = re.findall(r"^\| `(.+-base)` \| ([\d,]+) \|(.+)\|$", page, re.M)
    assert len(rows) == 4
    for preset, batch, each in rows:
        expected = {**MAE_PRESETS, **FINETUNE_PRESETS}[preset].optim.batch
        assert int(batch.replace(",", "")) == expected
        assert [int(cell) for cell in each.split("|")] == [expected // gpus for gpus in (8, 16, 32, 64)]


@pytest.mark.parametrize(("written", "cancels"), [(None, 3), (-9000, 3), (1500, 1)])
def test_the_watchdog_cancels_a_job_that_writes_nothing(written, cancels, tmp_path):
    """Each `sleep` lasts 1,000 s here, and the fourth is the last; `written`: when, after the job's start."""
    page, begin = (ROOT / "docs/cluster.md").read_text(), 1_700_000_000
    blocks = [text.partition("```")[0] for text in page.split("```sh\n")[1:]]
    loop = next(block for block in blocks if "heartbeat.json" in block)
    standins = {
        "date": "cat clock",
        "sleep": f"echo $(($(cat clock) + 1000)) > clock; [ $(cat clock) -le {begin + 4000} ]",
        "scancel": "echo $1 >> cancelled",
    }
    functions = "\n".join(f"{name}() {{ {text}; }}" for name, text in standins.items())
    (tmp_path / "clock").write_text(str(begin))
    if written is not None:
        (tmp_path / "runs/big").mkdir(parents=True)
        (tmp_path / "runs/big/heartbeat.json").touch()
        os.utime(tmp_path / "runs/big/heartbeat.json", (begin + written,) * 2)
    script = f"set -uo pipefail\n{functions}\n{loop}\nwait"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env={**os.environ, "SLURM_JOB_ID": "7"}, check=True)
    assert (tmp_path / "cancelled").read_text() == "7\n" * cancels


def test_an_array_packs_the_bytes_of_one_run(tmp_path):
    source = image_tree(tmp_path / "source", train=6, val=2)
    pack_images(source, tmp_path / "one", shard_size=2)
    words = ["tools.pack", "images", "--source", source, "--out", tmp_path / "array", "--shard-size", "2"]
    command = ["bash", ROOT / "docs/slurm-pack.sh", *words]
    python, job = tmp_path / "python", {"SLURM_CPUS_PER_TASK": 1, "PARTS": 2, "PY": tmp_path / "python"}
    python.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/started\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    envs = [slurm(tmp_path, SLURM_ARRAY_TASK_ID=i, **job) for i in (1, 2, 0)]
    tasks = [subprocess.Popen(command, env=env, stdout=-3) for env in envs[:2]]
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert not (tmp_path / "array/dataset.json").exists()
    subprocess.run(command, env=envs[2], stdout=-3, check=True, timeout=120)
    assert sums(tmp_path / "array") == sums(tmp_path / "one")
    assert (tmp_path / "started").read_text().count("-m tools.pack images") == 3, "PY names the Python"
