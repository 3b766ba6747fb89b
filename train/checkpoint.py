"""The training state and its checkpoints: written atomically, with SHA-256; damaged ones are set aside."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.files import atomic_text, atomic_write, check_pickle, sha256_of
from train.console import log
from train.distributed import World
from train.meters import Meters

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

KEPT = "kept-"  # before the name of a checkpoint that is not deleted
DAMAGED = ".damaged"  # appended to a damaged checkpoint's name


# ---- the state


@dataclass
class State:
    """Everything that a resume needs. Random draws and the order of the data follow from seed and step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: "ModelEmaV3 | None"
    meters: Meters
    step: int = 0
    elapsed: float = 0.0  # seconds of training over all resumes
    row: dict[str, Any] | None = None  # this step's metric row until its evaluation is done

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and exported: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def to_dict(self) -> dict:
        """The state for a checkpoint. All processes must call it together: each has its own meters."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        values = {"step": self.step, "elapsed": self.elapsed, "row": self.row}
        values |= {"model": self.model.state_dict(), "meters": self.meters.gathered()}
        # By parameter name, without hyperparameters: those come from the configuration, also on resume.
        values["optimizer"] = {names[parameter]: v for parameter, v in self.optimizer.state.items()}
        return values | ({"ema": self.ema.module.state_dict()} if self.ema else {})

    def restore(self, values: dict, world: World) -> None:
        """The inverse of `to_dict`."""
        self.model.load_state_dict(values["model"])
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        order = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        saved, optimizer = values["optimizer"], self.optimizer.state_dict()
        optimizer["state"] |= {number: saved[name] for number, name in enumerate(order) if name in saved}
        self.optimizer.load_state_dict(optimizer)
        if self.ema is not None:
            self.ema.module.load_state_dict(values.get("ema", values["model"]))
        self.meters.restore(values["meters"], world.rank, world.size)
        self.step, self.elapsed, self.row = values["step"], values["elapsed"], values["row"]

    def checksums(self) -> Tensor:
        """An int64 for each tensor that must be equal on all ranks: weights, optimizer state, average."""
        modules = (self.model, self.evaluated)
        tensors = [tensor for module in modules for tensor in module.state_dict().values()]
        tensors += [v for values in self.optimizer.state.values() for v in values.values()]
        sums = [_bits(tensor).sum(dtype=torch.int64).cpu() for tensor in tensors]
        return torch.stack([torch.tensor(self.step), *sums])


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's memory as integers."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8)


# ---- writing


class Writer:
    """Saves in the background. A step waits only for the copy to host memory and for the save before."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[Path] | None = None

    def save(self, step: int, state: dict) -> None:
        """Start to write `state`; raises UserError when the checkpoint before could not be written."""
        self.wait()
        self._last = self._pool.submit(save, self._folder, step, to_host(state), self._keep)

    def check(self, _row: object = None) -> None:
        """Raise UserError if the last save has already failed; called with every metric row."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way; raises UserError if it fails."""
        last, self._last = self._last, None
        try:
            if last is not None:
                last.result()
        except OSError as error:
            raise UserError(
                f"no checkpoint can be written to {self._folder} ({error.strerror}); free some space, then "
                "run the same command to resume from the last checkpoint"
            ) from error


def to_host(state: Any) -> Any:
    """A copy of nested dicts and lists of tensors and values, on the CPU, which training does not change.

    From a GPU all tensors are copied into pinned memory without waiting; one wait follows at the end.
    """
    copied = _copy(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state


def save(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write `state` (tensors and plain values) as step `step`, then delete all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
        # Written before the rename, so that a checkpoint under its final name always has its digest.
        atomic_text(_digest_path(path), sha256_of(temporary))
    for old in _all(folder)[:-keep]:
        old.unlink()
        _digest_path(old).unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp-*"):
        leftover.unlink()
    return path


def keep_before(folder: Path, step: int) -> None:
    """Keep the newest checkpoint before `step` under another name, which `save` does not delete."""
    for path in before(folder, step)[-1:]:
        for file in (path, _digest_path(path)):
            with suppress(OSError):  # some file systems have no hard links; it may be deleted right now
                file.with_name(KEPT + file.name.removeprefix(KEPT)).hardlink_to(file)


# ---- reading


def before(folder: Path, step: int) -> list[Path]:
    """The checkpoints of steps before `step`, also those of `keep_before`, the newest last."""
    found = {int(path.stem.rpartition("-")[2]): path for path in (*folder.glob(f"{KEPT}*.pt"), *_all(folder))}
    return [path for number, path in sorted(found.items()) if number < step]


def choose(folder: Path) -> Path | None:
    """The newest valid checkpoint, or None if there is none; damaged newer ones are renamed and logged.

    After the renaming `save` no longer counts them. Raises UserError, and changes nothing, when there are
    checkpoints and none is valid.
    """
    damaged = {}
    for path in reversed(_all(folder)):
        if not (found := problem(path)):
            for bad, why in damaged.items():
                _set_aside(bad, why)
            return path
        damaged[path] = found
    found = [*damaged, *folder.glob(f"step-*{DAMAGED}")]
    if found:
        raise UserError(
            f"none of the checkpoints in {folder} is valid ({', '.join(p.name for p in found)}); "
            "restore one, choose another RUN, or delete that folder to train from step 0"
        )
    return None


def problem(path: Path) -> str:
    """What is wrong with a checkpoint's file, or ""; reads all of it."""
    digest = _digest_path(path)
    if not digest.exists():
        return f"{digest.name} is missing"
    return "" if sha256_of(path) == digest.read_text() else "its SHA-256 does not match"


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    _digest_path(path).unlink(missing_ok=True)
    log(f"checkpoint {path} is damaged ({why}); it is now {aside.name}, and an older one is used")


def load(path: Path, device: torch.device) -> dict:
    """The state that `save` wrote, tensors and plain values only, on the CPU: a GPU would hold it twice.

    device: where its values will be copied. For a GPU the file is memory-mapped, so that the processes of a
    machine share one copy.
    """
    check_pickle(path)
    return torch.load(path, map_location="cpu", mmap=device.type == "cuda", weights_only=True)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
