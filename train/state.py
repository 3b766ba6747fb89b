"""What training changes from step to step, and a checkpoint holds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    row: dict[str, Any] | None = None  # this step's metric row while its evaluation is not done

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and exported: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def to_dict(self) -> dict:
        """The state for a checkpoint; all processes must call it together: each has its own meters."""
        values = {"step": self.step, "elapsed": self.elapsed, "row": self.row}
        values |= {"model": self.model.state_dict(), "optimizer": self._optimizer_state()}
        values |= {"ema": self.ema.module.state_dict()} if self.ema else {}
        return values | {"meters": self.meters.gathered()}

    def restore(self, values: dict, world: World) -> None:
        """The inverse of `to_dict`."""
        self.model.load_state_dict(values["model"])
        self._restore_optimizer(values["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(values.get("ema", values["model"]))
        self.meters.restore(values["meters"], world.rank, world.size)
        self.step, self.elapsed, self.row = values["step"], values["elapsed"], values["row"]

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """By parameter name. Hyperparameters are left out: the configuration sets them, also on resume."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: values for parameter, values in self.optimizer.state.items()}

    def _restore_optimizer(self, saved: dict[str, dict[str, Tensor]]) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        order = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        values = self.optimizer.state_dict()
        values["state"] = {number: saved[name] for number, name in enumerate(order) if name in saved}
        self.optimizer.load_state_dict(values)

    def checksums(self) -> Tensor:
        """An int64 for each tensor that must be equal in all processes: weights, optimizer state, average."""
        modules = (self.model, self.evaluated)
        tensors = [tensor for module in modules for tensor in module.state_dict().values()]
        tensors += [v for values in self.optimizer.state.values() for v in values.values()]
        sums = [_bits(tensor).sum(dtype=torch.int64).cpu() for tensor in tensors]
        return torch.stack([torch.tensor(self.step), *sums])


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's memory as integers."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8)
