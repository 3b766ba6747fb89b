"""Which device a process computes on, why there is none, and copies to it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from pipelines.errors import UserError

DRIVER = Path("/proc/driver/nvidia/version")
LEAST_DRIVER = 580  # what CUDA 13 requires, https://docs.nvidia.com/deploy/cuda-compatibility


def resolve_device(name: str, processes: int) -> str:
    """ "cuda" or "cpu" for `processes` on this machine; raises UserError when the GPUs do not suffice."""
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"speed.device is '{name}'; it can be auto, cuda or cpu")
    if processes < 1:
        raise UserError(f"speed.processes (GPUS) is {processes}; it must be at least 1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0 and processes == 1):
        return "cpu"
    if gpus == 0 and (problem := old_driver()):
        raise UserError(f"{problem}; update it, or add DEVICE=cpu (--speed.device cpu) to use the CPU")
    if processes > gpus and not one_each(gpus):
        raise UserError(
            f"{processes} GPUs were asked for and this machine has {gpus}; ask for fewer, or add DEVICE=cpu "
            f"(--speed.device cpu) to run the same {processes} processes on the CPU"
        )
    return "cuda"


def one_each(gpus: int) -> bool:
    """Whether the launcher shows every process one GPU, its own, as Slurm does with --gpus-per-task=1."""
    return gpus == 1 and "LOCAL_RANK" in os.environ and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")


def index(local_rank: int) -> int:
    """The number of this process's GPU among those that it sees."""
    return 0 if one_each(torch.cuda.device_count()) else local_rank


def old_driver() -> str:
    """What is wrong with this machine's NVIDIA driver, empty if there is none or it is new enough."""
    version = driver_version()
    if not version or int(version.partition(".")[0]) >= LEAST_DRIVER:
        return ""
    return (
        f"the NVIDIA driver {version} is too old for CUDA {torch.version.cuda or 13}, which requires "
        f"{LEAST_DRIVER} or newer"
    )


def driver_version() -> str:
    """The NVIDIA driver's version as the kernel gives it, or else nvidia-smi; empty where there is none."""
    text = DRIVER.read_text() if DRIVER.is_file() else ""
    if found := re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s", text):
        return found[1]
    if not (program := shutil.which("nvidia-smi")):
        return ""
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.match(r"\d+\.[\d.]+", said)
    return found[0] if found else ""
