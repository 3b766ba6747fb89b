"""Optimizer, learning-rate schedule and the update of the weights."""

import math
from fractions import Fraction

import torch
from torch import nn

from train.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD in timm's groups: no decay for 1-D parameters and position embeddings, lr by layer."""
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(
        model,
        weight_decay=config.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),  # pyrefly: ignore
        layer_decay=config.layer_decay,
    )
    if not config.decay_last_block:
        for group in groups:
            group["lr_scale"] = min(1.0, group["lr_scale"] / config.layer_decay)
    lr = scaled_lr(config)
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        for parameter in (p for group in sgd.param_groups for p in group["params"] if config.momentum > 0):
            # PyTorch would leave its memory as it found it if the first step is skipped.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)


def make_ema(model: nn.Module, config: OptimConfig):  # noqa: ANN201
    """timm's moving average of the weights; None when `ema` is 0."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=config.ema) if config.ema else None


def checkpoint_bytes(model: nn.Module, optim: OptimConfig) -> int:
    """The size of a checkpoint: weights, optimizer state and moving average, each in float32."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    state = 2 if optim.name == "adamw" else int(optim.momentum > 0)  # tensors per trained weight
    copies = [1 + (optim.ema > 0) + state * trained for _, trained in sizes]
    return 4 * sum(count * copied for (count, _), copied in zip(sizes, copies, strict=True))


def scaled_lr(config: OptimConfig) -> float:
    """The linear scaling rule (arXiv 1706.02677): lr x batch / lr_batch."""
    return config.lr * config.batch / config.lr_batch


def total_steps(optim: OptimConfig, samples: int) -> int:
    """Steps that cover `optim.epochs` of `samples` training samples; a last incomplete batch counts."""
    return math.ceil(Fraction(str(optim.epochs)) * samples / optim.batch)


def warmup_steps(optim: OptimConfig, samples: int) -> int:
    """Steps nearest to `optim.warmup_epochs`, at most all of them."""
    exact = Fraction(str(optim.warmup_epochs)) * samples / optim.batch
    return min(round(exact), total_steps(optim, samples))


def eval_interval(optim: OptimConfig, samples: int) -> int:
    """Steps between evaluations: an epoch, or what gives at least 10 and at most 100 evaluations per run."""
    steps = total_steps(optim, samples)
    longest = (steps - 1) // 9  # with which there are 10; the last step is always evaluated
    return max(1, min(max(round(samples / optim.batch), math.ceil(steps / 100)), longest))


def set_learning_rate(optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, samples: int) -> None:
    """Set every group's learning rate for `step`, counted from 0: lr_scale x the schedule.

    The schedule rises linearly from 0 to the full rate at step `warmup_steps`, then follows half a cosine
    that reaches `min_lr` where the last step ends, as MAE-st and SlowFast do.
    """
    steps, warmup, peak = total_steps(optim, samples), warmup_steps(optim, samples), scaled_lr(optim)
    if step < warmup:
        rate = peak * step / warmup
    else:
        progress = (step - warmup) / (steps - warmup)
        rate = optim.min_lr + (peak - optim.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip and step; a non-finite gradient skips the step on the device, without a host sync.

    After DDP's mean every process holds the same gradient, so all of them skip alike. Returns the norm before
    clipping and 1.0 where the step was skipped, both 0-D on the device.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm if clip_norm > 0 else float("inf"))
    skipped = (~torch.isfinite(norm)).float()
    optimizer.found_inf, optimizer.grad_scale = skipped, None  # fused optimizers read both  # pyrefly: ignore
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
