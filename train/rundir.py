"""The run folder: one writer, one configuration, and a record of where the numbers came from."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import IO

import torch

from pipelines.catalogue import DatasetInfo
from pipelines.errors import UserError
from pipelines.files import atomic_text, lock, sha256_of
from pipelines.machine import usable_cores
from train.config import Config, differences, to_dict

UNLOCKED = "a second training process in this folder would not be noticed"
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
    changed = [x for x in differences(old, to_dict(config)) if x.partition(":")[0] not in config.run.allow]
    if changed:
        raise UserError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}); "
            "run the old command to resume it, choose another name with RUN= (--run.name), or name what may "
            "change with --run.allow"
        )


def is_finished(config: Config) -> bool:
    return (folder_of(config) / "model.safetensors").exists()


def check_classes(run: Path, info: DatasetInfo) -> None:
    """Raise UserError unless `info` has the classes, in their order, that the run was trained on."""
    path = run / "data.json"
    known = json.loads(path.read_text())["classes"] if path.exists() else list(info.classes)
    if known == list(info.classes):
        return
    pairs = enumerate(zip_longest(known, info.classes, fillvalue="none"))
    number, (mine, theirs) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    raise UserError(
        f"{info.root} has other classes than {run} was trained on ({path}): its class {number} is "
        f"{theirs}, the run's is {mine}; evaluate on data packed with the same classes"
    )


def open_run(config: Config, info: DatasetInfo, note: Mapping[str, object]) -> IO[str]:
    """Create the folder, its config.json, env.json and data.json; returns the lock, held until it is closed.

    Raises UserError when another process writes to the folder, it cannot be written, or the data is no longer
    that of the run.
    """
    folder = folder_of(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / ".lock").open("w")
        lock(held, folder, UNLOCKED)
    except BlockingIOError as error:
        raise UserError(
            f"another process is training in {folder}; wait for it, or use another RUN"
        ) from error
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be written ({error.strerror}); choose another --run.root"
        ) from error
    # Each split's catalogue holds the checksum of every sample.
    checksums = {split: sha256_of(info.root / f"{split}.parquet") for split in info.splits}
    data = {"classes": info.classes, "splits": info.splits, "sha256": checksums}
    kept = folder / "data.json"
    resumes = any(folder.glob("checkpoints/*.pt")) and kept.exists() and "data" not in config.run.allow
    if resumes and json.loads(kept.read_text())["sha256"] != data["sha256"]:
        raise UserError(
            f"{info.root} is not the data that {folder} was trained on so far (see {kept}); restore it, "
            "choose another RUN, or go on with --run.allow data"
        )
    files = {"config.json": to_dict(config), "env.json": {**environment(), **note}, "data.json": data}
    for name, values in files.items():
        atomic_text(folder / name, json.dumps(values, indent=2) + "\n")
    return held


def environment() -> dict[str, object]:
    """Versions, hardware and commit: what a number needs to be believed."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(sys.orig_argv),
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "platform": platform.platform(),
        "cpus": usable_cores(),
        "cpus_of_machine": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "commit": _commit(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Which version of each package is installed, None where it is not."""
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    return {name: installed.get(name) for name in packages}


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git is None:
        return None
    describe = [git, "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    answer = subprocess.run(describe, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
