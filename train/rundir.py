"""The run folder: one writer, one configuration, and a record of where the numbers came from."""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import torch

from pipelines.errors import UserError
from pipelines.files import atomic_write
from train.config import Config, differences, to_dict

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "webdataset", "pyarrow", "numpy")


def folder_of(config: Config) -> Path:
    return config.run.root / config.run.name


def check_config(config: Config) -> None:
    """Refuse a run folder that holds results of other settings (UserError names what differs)."""
    path = folder_of(config) / "config.json"
    has_results = is_finished(config) or any(path.parent.glob("checkpoints/*.pt"))
    if not (path.exists() and has_results):
        return
    try:
        old = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); move the folder away or use another RUN"
        ) from error
    changed = differences(old, to_dict(config))
    if changed:
        raise UserError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}); "
            "run the old command to resume it, or choose another name with RUN= (--run.name)"
        )


def is_finished(config: Config) -> bool:
    return (folder_of(config) / "model.safetensors").exists()


def open_run(config: Config, note: dict[str, object]) -> IO[str]:
    """Create the folder and its `config.json` and `env.json`; returns the lock, held until it is closed.

    Raises UserError when another process writes to the folder or it cannot be written.
    """
    folder = folder_of(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be written ({error.strerror}); choose another --run.root"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"another process is training in {folder}; wait for it, or use another RUN"
        ) from error
    for name, values in (("config.json", to_dict(config)), ("env.json", {**environment(), **note})):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")
    return lock


def environment() -> dict[str, object]:
    """Versions, hardware and commit: what a number needs to be believed."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(sys.orig_argv),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git is None:
        return None
    describe = [git, "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    answer = subprocess.run(describe, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
