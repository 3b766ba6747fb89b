"""Compute which micro batch fits a GPU; nothing is measured: python -m benchmarks memory

With AdamW, a parameter takes 16 bytes (itself, its gradient, two moments) and 2 bytes for the bf16 copy of
autocast. The tensors that autograd keeps of a forward pass are added up under bf16 autocast, with tensors
that have shapes but no memory. A tenth of the GPU is reserved for workspaces and fragmentation.
torch.compile keeps fewer tensors, so a GPU needs less than these numbers.
"""

import math
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from models.mae import MaskedAutoencoder
from models.zoo import create
from pipelines.errors import run_cli
from train.config import OptimConfig
from train.optim import checkpoint_bytes

SIZES = ("tiny", "small", "base", "base_plus", "large", "huge")
BYTES_A_PARAMETER = 18
USABLE = 0.9


@dataclass(frozen=True)
class Need:
    """Memory in bytes."""

    model: str
    fixed: float
    a_sample: float
    checkpoint: float  # on disk, with AdamW and without a moving average

    def micro_batch(self, gigabytes: float) -> int:
        """Most samples per forward that fit, rounded down to a power of two; 0 if one does not fit."""
        most = int((gigabytes * 2**30 * USABLE - self.fixed) / self.a_sample)
        return 2 ** int(math.log2(most)) if most > 0 else 0


def need_of(name: str, **overrides: object) -> Need:
    """Memory for training the model `name`; overrides as in models.create."""
    with torch.device("meta"):
        model = create(name, **overrides).train()
    with FakeTensorMode():
        for module in model.modules():  # to_empty cannot convert a meta tensor to a fake one
            for key, t in module.named_parameters(recurse=False):
                module._parameters[key] = nn.Parameter(torch.empty(t.shape))
            for key, t in module.named_buffers(recurse=False):
                module._buffers[key] = torch.empty(t.shape, dtype=t.dtype)
        one, two = (saved_bytes(model, batch) for batch in (1, 2))
    parameters = sum(p.numel() for p in model.parameters())
    saved = checkpoint_bytes(model, OptimConfig())
    return Need(name, parameters * BYTES_A_PARAMETER, two - one, saved)


def saved_bytes(model: nn.Module, batch: int) -> int:
    """Bytes that autograd keeps for the backward pass of `batch` samples, without parameters."""
    own = {value.untyped_storage()._cdata for value in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # otherwise the storage of a later tensor may get the same address
        return tensor

    alive: list[Tensor] = []
    x = torch.randn(batch, 3, *model.input_size)  # pyrefly: ignore
    given = {}
    if isinstance(model, MaskedAutoencoder):
        units = model.num_mask_units
        share = 0.1 if model.config.video else 0.4
        given = {"keep": torch.arange(int(units * share)).expand(batch, -1)}
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = model(x, **given)
        loss = output if isinstance(output, Tensor) else output.loss
        loss.float().mean()
    return sum(kept.values())


def run(gigabytes: tuple[int, ...] = (16, 24, 40, 80, 141)) -> list[Need]:
    """Compute the memory of every published model; print a table for GPUs of these sizes."""
    shapes = {"224": SIZES, "16x224": SIZES[2:]}
    needs = []
    columns = ("model", "state (GB)", "a sample (MB)", "checkpoint (GB on disk)")
    table = Table(*columns, *(f"{size} GB" for size in gigabytes))
    for shape, sizes in shapes.items():
        for task in ("mae_", ""):
            for size in sizes:
                need = need_of(f"{task}hiera_{size}_{shape}")
                fits = (str(need.micro_batch(size) or "-") for size in gigabytes)
                sizes_of_one = (need.fixed / 2**30, need.a_sample / 2**20, need.checkpoint / 1e9)
                numbers = map(str.format, ("{:.1f}", "{:.0f}", "{:.2f}"), sizes_of_one)
                table.add_row(need.model, *numbers, *fits)
                needs.append(need)
    Console(width=130).print(table)
    return needs


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run) and None)
