"""Atomic checkpoints with SHA-256; damaged ones are set aside with a warning."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.files import atomic_text, atomic_write, sha256_of

DAMAGED = ".damaged"  # appended to a damaged checkpoint's name


class Writer:
    """Saves in the background: a step waits for the copy to host memory, and for the save before."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[Path] | None = None

    def save(self, step: int, state: dict) -> None:
        """Begin to write `state`; raises UserError when the one before could not be written."""
        self.wait()
        self._last = self._pool.submit(save, self._folder, step, to_host(state), self._keep)

    def wait(self) -> None:
        """Let the save under way finish."""
        last, self._last = self._last, None
        try:
            if last is not None:
                last.result()
        except OSError as error:
            raise UserError(
                f"no checkpoint can be written to {self._folder} ({error.strerror}); free some space, then "
                "run the same command to go on from the last one"
            ) from error


def to_host(state: Any) -> Any:
    """A copy of nested dicts and lists of tensors and values, on the CPU and out of training's reach.

    From a GPU all tensors are copied at once, into pinned memory, and waited for at the end.
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


def choose(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint or None, and a sentence for each newer damaged one.

    The damaged ones are renamed, so that `save` no longer counts them. Raises UserError, and changes nothing,
    when there are checkpoints and none is valid.
    """
    damaged = {}
    for path in reversed(_all(folder)):
        digest = _digest_path(path)
        if digest.exists() and sha256_of(path) == digest.read_text():
            return path, [_set_aside(bad, problem) for bad, problem in damaged.items()]
        damaged[path] = "its SHA-256 does not match" if digest.exists() else f"{digest.name} is missing"
    found = [*damaged, *folder.glob(f"step-*{DAMAGED}")]
    if found:
        raise UserError(
            f"none of the checkpoints in {folder} is valid ({', '.join(p.name for p in found)}); "
            "restore one, choose another RUN, or delete that folder to train from step 0"
        )
    return None, []


def _set_aside(path: Path, problem: str) -> str:
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    _digest_path(path).unlink(missing_ok=True)
    return f"checkpoint {path} is damaged ({problem}); it is now {aside.name}, and an older one is used"


def load(path: Path, device: torch.device) -> dict:
    """The state that `save` wrote, tensors and plain values only, on the CPU: a GPU would hold it twice.

    device: where its values will be copied. For a GPU the file is mapped, so that the processes of a machine
    share one copy of it.
    """
    return torch.load(path, map_location="cpu", mmap=device.type == "cuda", weights_only=True)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
