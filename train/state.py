"""What training changes from step to step, and a checkpoint holds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from train.distributed import World
from train.meters import Meters

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


@dataclass
class State:
    """Everything that resuming needs; random draws and the data's order follow from seed and step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: "ModelEmaV3 | None"
    meters: Meters
    step: int = 0
    elapsed: float = 0.0  # seconds of training over all resumes
    best: float = float("-inf")  # score of the best evaluation

    @property
    def evaluated(self) -> nn.Module:
        """Whose weights are evaluated and exported: the moving average's where there is one."""
        return self.model if self.ema is None else self.ema.module

    def to_dict(self) -> dict:
        """For a checkpoint; all processes call it together, for the meters are each one's own."""
        values = {"step": self.step, "elapsed": self.elapsed, "best": self.best}
        values |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        values |= {"ema": self.ema.module.state_dict()} if self.ema else {}
        return values | {"meters": self.meters.gathered()}

    def restore(self, values: dict, world: World) -> None:
        """The inverse of `to_dict`."""
        self.model.load_state_dict(values["model"])
        self.optimizer.load_state_dict(values["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(values.get("ema", values["model"]))
        self.meters.restore(values["meters"], world.rank, world.size)
        self.step, self.elapsed, self.best = values["step"], values["elapsed"], values["best"]
