"""The run folder: one writer, one configuration, and the record of every start."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import torch

from pipelines.dataset import DatasetInfo, read_info
from pipelines.errors import UNREADABLE, UserError, first_line
from pipelines.files import atomic_text, json_text, lock
from pipelines.machine import usable_cores
from train import checkpoint, distributed
from train.config import Config, FinetuneConfig, from_dict, refused_changes, shared_settings, to_dict
from train.console import log, screen
from train.distributed import World
from train.metrics import Row
from train.optim import total_steps
from train.words import shown

UNLOCKED = "a second training process in this folder would not be noticed"
STARTED = {".lock", "log.txt", "logs", "tensorboard", "wandb", "trackers.json"}  # before the first step
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "webdataset", "pyarrow", "numpy")


@dataclass(frozen=True)
class Run:
    """This process's place in a run."""

    world: World
    folder: Path | None = None
    """Where results go; None for commands that leave the run folder as it is."""
    data: Mapping[str, object] = field(default_factory=dict)
    """The contents of data.json."""
    newest: Path | None = None
    """The checkpoint to resume from."""
    finished: bool = False
    lock: IO[str] | None = None
    """Rank 0's lock of the folder, held until it is closed."""

    def close(self) -> None:
        """Close the log file and release the lock of the folder."""
        screen.close()
        if self.lock is not None:
            self.lock.close()

    def beat(self, row: Row, state: str = "training") -> None:
        """On rank 0, replace heartbeat.json: the row's step, the time, and what the run does.

        state: training, evaluating, stopped or finished. The file is not flushed to the disk, so that no row
        waits for that.
        """
        if self.lock is not None and self.folder is not None:
            temporary = self.folder / ".heartbeat.tmp"
            values = {"step": row["step"], "time": time.time(), "state": state}
            with suppress(OSError):  # the run can do without it
                temporary.unlink(missing_ok=True)  # it may be a link
                temporary.write_text(json.dumps(values) + "\n")
                temporary.replace(self.folder / "heartbeat.json")

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Remove the run folder after a `UserError`, if it holds only what starts that failed have left."""
        try:
            yield
        except UserError:
            if self.lock is not None and self.folder is not None:
                self.close()
                if {path.name for path in self.folder.iterdir()} <= STARTED:
                    shutil.rmtree(self.folder, ignore_errors=True)
            raise


def start_run(config: Config) -> Run:
    """Join the other processes, lock the run folder, open its log; rank 0 chooses the checkpoint.

    Raises UserError when the processes do not agree on settings and data, or the folder is not for this run.
    """
    world, folder = distributed.start(config.speed.device, config.speed.timeout), config.run.folder
    data = data_identity(read_info(config.data.path))
    settings = shared_settings(config)
    distributed.check_agreement(world, "the settings", settings, "start every process with the same command")
    distributed.check_agreement(world, "the shards", data, "stage the same dataset on every machine")
    entered = distributed.on_rank_0(world, lambda: enter(config, data))
    finished, newest = distributed.broadcast(entered[1:] if entered else (False, None))
    if not finished:
        if not world.is_main:
            screen.open(folder / "logs" / f"rank-{world.rank}.txt")
        log(f"run {folder}: {world.size} process(es) on {distributed.device_text(world)}")
        log_cores()
    return Run(world, folder, data, newest, finished, entered[0] if entered else None)


def log_cores() -> None:
    """Log the CPU cores per process, with a warning where that is one; all processes call it together."""
    cores = distributed.gather_objects(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    least, most = max(1, min(cores)), max(1, *cores)
    log(f"CPU cores per process: {least if least == most else f'{least} to {most}'}")
    if least == 1:
        few = f"WARNING: {sum(count <= 1 for count in cores)} of {len(cores)} processes have 1 core"
        fix = "give each process more, under Slurm with --cpus-per-task for sbatch and srun"
        log(f"{few}: decoding may be slower than training; {fix}")


def enter(config: Config, data: Mapping[str, object]) -> tuple[IO[str], bool, Path | None]:
    """Lock the run folder and open its log; gives the lock, whether the run is finished, its checkpoint.

    Raises UserError when the folder is not for this run or has nothing to resume from.
    """
    folder = config.run.folder
    held = lock_run(folder)
    check_config(config)
    exported = exported_step(folder)
    if exported == last_step(config):
        log(f"{folder} is finished; for another run choose another RUN (--run.name)")
        held.close()
        return held, True, None
    check_data(config, data)
    screen.open(folder / "log.txt")
    newest = checkpoint.choose(folder / "checkpoints")
    if newest is None and exported:
        raise UserError(
            f"{folder} has final weights and no checkpoint to resume from; choose another RUN, "
            "with INIT= (--model.init) for these weights"
        )
    if newest is None and (folder / "metrics.csv").exists():
        log(f"{folder} has no checkpoint: training begins again at step 0, and replaces the rows there")
    return held, False, newest


def check_config(config: Config) -> None:
    """Raise UserError if the run folder has results of other settings that may not change."""
    folder = config.run.folder
    path, old = folder / "config.json", None
    if path.exists() and (exported_step(folder) or any(folder.glob("checkpoints/step-*.pt*"))):
        try:
            old = from_dict(json.loads(path.read_bytes()))
        except UNREADABLE as error:
            how = "move the folder away or use another RUN"
            raise UserError(f"{path} cannot be read ({first_line(error)}); {how}") from error
    fixed, refused = refused_changes(old, config)
    if changes := fixed or refused:
        what = "; ".join(f"{key}: {change}" for key, change in changes.items())
        how = f", or name what may change with --run.allow {' '.join(refused)}"
        raise UserError(
            f"{folder} contains a run with other settings ({what})"
            f"{', which cannot change within a run' if fixed else ''}; run the old command to resume it, "
            f"or choose another RUN (--run.name){'' if fixed else how}"
        )


def exported_step(folder: Path) -> int:
    """The step of a run folder's final weights, 0 if there are none yet."""
    path = folder / "model.safetensors"
    if not path.exists():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["hiera-train"])["step"]
    except (SafetensorError, *UNREADABLE) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete it, and the same command resumes"
        ) from error


def is_finished(config: Config) -> bool:
    """Whether the run has final weights of its last step."""
    return exported_step(config.run.folder) == last_step(config)


def last_step(config: Config) -> int:
    """The last step of the run on its data."""
    return total_steps(config.optim, read_info(config.data.path).splits["train"]["samples"])


def check_classes(folder: Path, info: DatasetInfo) -> None:
    """Raise UserError unless `info` has the classes, in their order, that the run was trained on."""
    known, given = data_of(folder).get("classes", info.classes), info.classes
    for number, names in enumerate(zip_longest(known, given, fillvalue="none")):
        if names[0] != names[1]:
            mine, theirs = shown(names)
            raise UserError(
                f"{info.root} has other classes than {folder} was trained on (data.json): its class {number} "
                f"is {theirs}, the run's is {mine}; evaluate on data packed with the same classes"
            )


def is_data_of(folder: Path, info: DatasetInfo) -> bool:
    """Whether a run was trained on this dataset, or a copy of it; True if it has no record of its data."""
    return data_of(folder).get("sha256", info.catalogue_sha256) == info.catalogue_sha256


def data_of(folder: Path) -> dict[str, Any]:
    """The contents of a run's data.json, empty if there is none. Raises UserError if it is damaged."""
    path = folder / "data.json"
    try:
        found = {**json.loads(path.read_bytes())} if path.exists() else {}
        classes = found.get("classes", [])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError("the classes are not a list of names")
        return found
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); restore it") from error


def lock_run(folder: Path) -> IO[str]:
    """Create the run folder and lock it until the returned file is closed.

    Raises UserError when another process trains there or the folder cannot be written.
    """
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
    """The contents of data.json: classes, counts, and the SHA-256 of each catalogue."""
    return {"classes": list(info.classes), "splits": info.splits, "sha256": info.catalogue_sha256}


def check_data(config: Config, data: Mapping[str, object]) -> None:
    """Raise UserError if the run has checkpoints of other data and run.allow does not name "data".

    A classifier's checkpoints need the same number of classes in any case.
    """
    folder = config.run.folder
    if not any(folder.glob("checkpoints/step-*.pt*")):
        return
    known = data_of(folder)
    before, now = (len(one.get("classes", data["classes"])) for one in (known, data))  # pyrefly: ignore
    if before != now and isinstance(config, FinetuneConfig):
        raise UserError(
            f"{config.data.path} has {now} classes, and the model of {folder} has {before}; choose another "
            "RUN, with INIT= (--model.init) for its weights"
        )
    allowed = {"data", "--data"} & set(config.run.allow)
    if not allowed and known.get("sha256", data["sha256"]) != data["sha256"]:
        raise UserError(
            f"{config.data.path} is not the data that {folder} was trained on so far (see its data.json); "
            "restore it, choose another RUN, or add --run.allow data"
        )


# ---- the record of every start


def record_start(config: Config, data: Mapping[str, object], start: Mapping[str, object]) -> None:
    """Write config.json and data.json, and append this start to env.json."""
    folder = config.run.folder
    starts = folder / "env.json"
    before = []
    with suppress(OSError, ValueError):
        before = json.loads(starts.read_bytes())
    if not isinstance(before, list):
        before = [before]
    entries = [*before, {**start, **environment()}]
    for name, values in {"config.json": to_dict(config), "env.json": entries, "data.json": data}.items():
        atomic_text(folder / name, json_text(values, indent=2) + "\n")


def environment(gpus: list[str] | None = None) -> dict[str, object]:
    """Versions, hardware and commit of a figure. gpus: their names, if CUDA must not start here."""
    if gpus is None:
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


@cache
def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package, None if it is not installed."""
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
