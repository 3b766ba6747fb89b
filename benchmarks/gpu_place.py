"""What every check of `make gpu-check` has. It needs no DALI and no pyarrow, nor do the checks of models."""

import dataclasses
from pathlib import Path

import torch


class Problem(Exception):
    """A check failed; the text goes into the table."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Device and data of all checks."""

    device: torch.device
    images: Path  # packed shards of pictures
    clips: Path  # packed shards of clips
    work: Path  # folder for the files of checks

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


def need(condition: object, text: str) -> None:
    if not condition:
        raise Problem(text)
