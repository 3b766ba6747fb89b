"""Checkpoints: whole or absent, checked by a digest, the damaged ones passed over aloud."""

import hashlib
from pathlib import Path

import torch

from pipelines.files import atomic_write


def save(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write `state` (tensors and plain values) as step `step`, then drop all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
        digest = _digest(temporary)
        # Written before the rename: a checkpoint under its final name always has its digest beside it.
        with atomic_write(_digest_path(path)) as note:
            note.write_text(digest)
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
        problem = _problem(path)
        if problem is None:
            return torch.load(path, map_location=device, weights_only=True), complaints
        complaints.append(f"checkpoint {path} {problem}; falling back to the one before it")
    return None, complaints


def _problem(path: Path) -> str | None:
    note = _digest_path(path)
    if not note.exists():
        return "has no digest beside it"
    return None if _digest(path) == note.read_text() else "is damaged (its digest does not match)"


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
