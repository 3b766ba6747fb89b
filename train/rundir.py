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
from contextlib import suppress
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import IO

import torch

from pipelines.dataset import DatasetInfo, read_info
from pipelines.errors import UserError
from pipelines.files import atomic_text, lock
from pipelines.machine import usable_cores
from train import checkpoint
from train.config import FIXED, Config, allowed, differences, to_dict
from train.optim import total_steps

UNLOCKED = "a second training process in this folder would not be noticed"
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "webdataset", "pyarrow", "numpy")


def folder_of(config: Config) -> Path:
    return config.run.root / config.run.name


def enter(config: Config, data: Mapping[str, object]) -> tuple[IO[str], bool, Path | None, list[str]]:
    """Take the run folder: its lock, whether the run is finished, its newest checkpoint, what to print.

    Raises UserError when the folder is not for this run or has nothing to resume from.
    """
    held = lock_run(config)
    check_config(config)
    if is_finished(config):
        held.close()
        return held, True, None, []
    check_data(config, data)
    newest, words = checkpoint.choose(folder_of(config) / "checkpoints")
    if newest is None and exported_step(folder_of(config)):
        raise UserError(
            f"{folder_of(config)} has final weights and no checkpoint to resume from; choose another RUN, "
            "with INIT= (--model.init) for these weights"
        )
    return held, False, newest, words


def check_config(config: Config) -> None:
    """Raise UserError if the run folder holds results of other settings that may not change."""
    may_change = allowed(config)
    path = folder_of(config) / "config.json"
    if not path.exists() or not (
        exported_step(path.parent) or any(path.parent.glob("checkpoints/step-*.pt*"))
    ):
        return
    try:
        changed = differences(json.loads(path.read_text()), to_dict(config))
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); move the folder away or use another RUN"
        ) from error
    if fixed := {key: change for key, change in changed.items() if key in FIXED}:
        raise UserError(
            f"{path.parent} holds a run with other settings ({_listed(fixed)}), which cannot change within a "
            "run; choose another RUN (--run.name)"
        )
    if refused := {key: change for key, change in changed.items() if key not in may_change}:
        raise UserError(
            f"{path.parent} holds a run with other settings ({_listed(refused)}); run the old command to "
            "resume it, choose another RUN (--run.name), or name what may change with "
            f"--run.allow {' '.join(refused)}"
        )


def _listed(changes: Mapping[str, str]) -> str:
    return "; ".join(f"{key}: {change}" for key, change in changes.items())


def exported_step(run: Path) -> int:
    """The step of a run folder's final weights, 0 if there are none yet."""
    path = run / "model.safetensors"
    if not path.exists():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["hiera-train"])["step"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete it, and the same command resumes"
        ) from error


def is_finished(config: Config) -> bool:
    """Whether the run has its final weights, of the last step that its epochs give on this data."""
    samples = read_info(config.data.path).splits["train"]["samples"]
    return exported_step(folder_of(config)) == total_steps(config.optim, samples)


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


def lock_run(config: Config) -> IO[str]:
    """Create the run folder and lock it until the file that is returned is closed.

    Raises UserError when another process trains there or the folder cannot be written.
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
    return held


def data_identity(info: DatasetInfo) -> dict[str, object]:
    """What data.json holds: classes, counts, and the SHA-256 of each catalogue, which lists all checksums."""
    return {"classes": list(info.classes), "splits": info.splits, "sha256": info.catalogue_sha256}


def check_data(config: Config, data: Mapping[str, object]) -> None:
    """Raise UserError if the run has checkpoints of other data and run.allow does not name "data"."""
    folder = folder_of(config)
    kept = folder / "data.json"
    resumes = any(folder.glob("checkpoints/step-*.pt*")) and kept.exists() and "data" not in allowed(config)
    if resumes and json.loads(kept.read_text())["sha256"] != data["sha256"]:
        raise UserError(
            f"{config.data.path} is not the data that {folder} was trained on so far (see {kept}); restore "
            "it, choose another RUN, or add --run.allow data"
        )


def record_start(config: Config, data: Mapping[str, object], start: Mapping[str, object]) -> None:
    """Write config.json and data.json, and append this start to env.json."""
    folder = folder_of(config)
    starts = folder / "env.json"
    before = []
    with suppress(OSError, ValueError):
        before = json.loads(starts.read_text())
    if not isinstance(before, list):
        before = [before]
    entries = [*before, {**start, **environment()}]
    for name, values in {"config.json": to_dict(config), "env.json": entries, "data.json": data}.items():
        atomic_text(folder / name, json.dumps(values, indent=2) + "\n")


def environment() -> dict[str, object]:
    """Versions, hardware and commit: what a number needs to be believed."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
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
