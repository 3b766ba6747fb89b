"""Checkpoints: whole or absent, checked by a digest, the damaged ones passed over aloud."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.files import atomic_text, atomic_write, sha256_of


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
    """A copy of nested dicts and lists of tensors and values, on the CPU and out of training's reach."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    return [to_host(value) for value in state] if isinstance(state, list) else state


def save(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write `state` (tensors and plain values) as step `step`, then drop all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
        # Written before the rename: a checkpoint under its final name always has its digest beside it.
        atomic_text(_digest_path(path), sha256_of(temporary))
    for old in _all(folder)[:-keep]:
        old.unlink()
        _digest_path(old).unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp-*"):
        leftover.unlink()
    return path


def load_newest(folder: Path, device: torch.device) -> tuple[dict | None, list[str]]:
    """The newest undamaged checkpoint, and one sentence for each newer one that had to be passed over."""
    complaints = []
    for path in reversed(_all(folder)):
        note = _digest_path(path)
        if note.exists() and sha256_of(path) == note.read_text():
            return torch.load(path, map_location=device, weights_only=True), complaints
        problem = "is damaged (its digest does not match)" if note.exists() else "has no digest beside it"
        complaints.append(f"checkpoint {path} {problem}; falling back to the one before it")
    return None, complaints


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")
