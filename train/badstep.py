"""Inspects a step whose loss or gradient is not finite: its rows, their losses, and the first faulty layer.

A run inspects its first such step when the host learns of it, which may be `run.log_every` steps later, with
the weights of that moment. `make replay` (train/replay.py) repeats the step with its own weights.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.layers import NormalizedInput
from pipelines.dataset import read_batch
from pipelines.errors import UserError, first_line
from pipelines.files import atomic_text
from train import checkpoint, distributed
from train.build import autocast_for, micro_batches, training_batches
from train.checkpoint import State
from train.config import Config
from train.console import command_of, log
from train.distributed import World
from train.task import Task

Report = dict[str, Any]


def record(config: Config, task: Task, world: World, state: State, step: int, loss: float) -> None:
    """Write bad-step-STEP.json into the run folder, and keep the checkpoint before `step` for `make replay`.

    loss: of the step, as the run computed it. All processes must call it together.
    """
    report = {"step": step, "loss": loss, "weights_after_step": state.step}
    report |= inspect(config, task, world, state.model, step)
    if not world.is_main:
        return
    folder = config.run.folder
    checkpoint.keep_before(folder / "checkpoints", step)
    path = write(folder / f"bad-step-{step}.json", report)
    place = f"first in {place_of(report)}" if place_of(report) else "but with the current weights both are"
    log(
        f"step {step}: the loss or the gradient is not finite, {place}; {path} lists its rows, and "
        f"`{command_of(config.run.folder, 'replay', 'train.replay', step=step)}` repeats it"
    )


def place_of(report: Report) -> str:
    """Where the first non-finite value of an inspected step is, empty if all values are finite."""
    first = report.get("first_nonfinite")
    return f"{first['layer']} ({first['pass']})" if first else report.get("problem", "")


def write(path: Path, report: Report) -> Path:
    """Write a report as JSON, which has no NaN and no infinity: they become strings that `float` reads."""
    plain = json.loads(json.dumps(report), parse_constant=str)
    atomic_text(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    return path


# ---- one step


def inspect(config: Config, task: Task, world: World, model: nn.Module, step: int) -> Report:
    """The rows of a step with their losses, the first non-finite value, and each layer's gradient norm.

    The batch is that of `step`, the weights are those of now. Neither weights nor gradients change. All
    processes must call it together. Gradient norms are the largest of all processes; each has those of its
    own rows.
    """
    part: Report
    try:
        part = _inspect(config, task, world, model, step)
    except (RuntimeError, MemoryError, UserError) as error:  # it must not end the run
        part = {"problem": f"the inspection failed: {first_line(error)}"}
    parts = distributed.gather_objects(part)
    merged: Report = {"rows": [row for part in parts for row in part.get("rows", ())]}
    for name in ("first_nonfinite", "problem"):
        merged |= {name: next((part[name] for part in parts if part.get(name)), None)}
    norms: list[dict[str, float]] = [part.get("gradient_norms", {}) for part in parts]
    merged["gradient_norms"] = {
        layer: torch.tensor([one.get(layer, 0.0) for one in norms]).amax().item()  # NaN if one is
        for layer in dict.fromkeys(layer for one in norms for layer in one)
    }
    return merged


def _inspect(config: Config, task: Task, world: World, model: nn.Module, step: int) -> Report:
    """This process's part of `inspect`."""
    assert task.row_losses is not None
    accumulate = micro_batches(config, world.size, task.mixed)[1]
    autocast, ready = autocast_for(config.speed, world.device), NormalizedInput(model, config.data.frames)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sums = dict.fromkeys(parameters, torch.zeros((), device=world.device))
    places = [("weights", name) for name, value in parameters.items() if not _finite(value)][:1]
    rows = []
    ready.to(world.device).train()
    for batch in islice(training_batches(config, world, task.training, accumulate, step - 1), accumulate):
        with _watched(model, places), autocast():
            losses = task.row_losses(ready, batch)
            mean = losses.mean() / accumulate
            # Not `backward`, which would leave gradients and start DDP's exchange of them.
            values = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
        for name, value in zip(parameters, values, strict=True):
            sums[name] = sums[name] if value is None else sums[name] + value
        columns = zip(batch.epochs.tolist(), batch.ids.tolist(), losses.tolist(), strict=True)
        rows += [
            {"process": world.rank, "epoch": epoch, "id": number, "loss": loss}
            for epoch, number, loss in columns
        ]
    sources = read_batch(task.training.catalogue, ("source",))["source"]
    for row in rows:
        row["source"] = sources[row["id"]].as_py()  # the path below the folder that was packed
    first = {"pass": places[0][0], "layer": places[0][1], "process": world.rank} if places else None
    return {"rows": rows, "first_nonfinite": first, "gradient_norms": layer_norms(sums)}


@contextmanager
def _watched(model: nn.Module, places: list[tuple[str, str]]) -> Iterator[None]:
    """Append to `places` each (pass, layer) whose output, or the gradient of whose output, is not finite."""

    def check(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                if not _finite(tensor):
                    places.append(("forward", name))
                if tensor.requires_grad:
                    tensor.register_hook(partial(check_gradient, name))

    def check_gradient(name: str, gradient: Tensor) -> None:
        if not _finite(gradient):
            places.append(("backward", name))

    handles = [
        module.register_forward_hook(partial(check, name or "the loss"))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def layer_norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The gradient norm of each layer, such as "blocks.3", from the gradients by parameter name."""
    squares: dict[str, Tensor] = {}
    for name, value in gradients.items():
        layer = re.match(r"\w+(\.\d+)?", name)[0]  # pyrefly: ignore
        square = value.double().square().sum()
        squares[layer] = squares[layer] + square if layer in squares else square
    return {layer: square.sqrt().item() for layer, square in squares.items()}
