"""From a configuration to the parts of a run: checks, device, precision, batches, model."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from pipelines.dataset import Dataset, check_shards, open_dataset, read_info
from pipelines.decode import message
from pipelines.errors import UserError
from pipelines.loader import Batch, TrainLoader
from pipelines.views import check_info, clip_notes
from train.compute import ATTENTION, Autocast, choose_kernels
from train.config import Config, FinetuneConfig, MaeConfig, flatten, to_dict
from train.device import resolve_device
from train.distributed import World
from train.optim import scaled_lr
from train.presets import pretraining_notes

TINY, HUGE = 1e-9, float("inf")
LIMITS = (  # least, most, and the settings that keep to them
    (TINY, HUGE, ("optim.epochs",)),
    (1, HUGE, ("optim.batch", "optim.lr_batch", "speed.micro_batch", "speed.timeout")),
    (1, HUGE, ("run.log_every", "run.eval_every", "run.checkpoint_every", "run.keep", "run.max_skipped")),
    (0, HUGE, ("speed.eval_batch", "optim.clip_norm")),
    (0, HUGE, ("speed.restarts", "mixup", "cutmix")),
    (TINY, 1, ("optim.layer_decay",)),
    (0, 1 - TINY, ("optim.ema", "model.drop_path", "model.dropout", "smoothing")),
)
WORDS = {
    "speed.precision": ("auto", "bf16", "fp32", "tf32"),
    "speed.compile": ("auto", "yes", "no"),
    "speed.attention": tuple(ATTENTION),
    "optim.name": ("adamw", "sgd"),
    "freeze": ("none", "trunk"),
}


def check(config: Config) -> None:
    """Find what can be wrong before any process starts; raises UserError."""
    check_ranges(config)
    info = read_info(config.data.path)
    check_info(info, config.data, config.views[0] if isinstance(config, FinetuneConfig) else 1)
    if "train" not in info.splits:
        raise UserError(f"{config.data.path} has no train split; pack one with tools.pack_*")
    check_shards(info)
    resolve_device(config.speed.device, config.speed.processes)


def check_ranges(config: Config) -> None:
    """Raise UserError for a setting that is out of its range, or none of the words it can be."""
    values: dict[str, Any] = flatten(to_dict(config))
    limits = [(key, values[key], low, high) for low, high, keys in LIMITS for key in keys if key in values]
    if isinstance(config, FinetuneConfig):
        limits.append(("views", min(config.views), 1, HUGE))
    for key, value, low, high in limits:
        if not low <= value <= high:
            least = "more than 0" if low == TINY else f"at least {low:g}"
            most = {HUGE: "", 1 - TINY: " and less than 1"}.get(high, f" and at most {high:g}")
            raise UserError(f"{key} is {value}; it must be {least}{most}")
    for key, known in WORDS.items():
        if key in values and values[key] not in known:
            words = ", ".join(word or "empty" for word in known)
            raise UserError(f"{key} is '{values[key]}'; it can be {words}")
    # An absolute name begins with an empty part; make hands names on through a shell.
    if {"", ".", ".."} & set(config.run.name.split("/")) or re.search(r"[\s'\"]", config.run.name):
        raise UserError(
            f"run.name is '{config.run.name}'; it must name a folder below {config.run.root}, without blanks "
            "or quotes"
        )
    if (longest := max(len(os.fsencode(part)) for part in config.run.name.split("/"))) > 255:
        raise UserError(f"run.name has a part of {longest} bytes; choose parts of at most 255 bytes")


def shared_settings(config: Config) -> dict[str, object]:
    """The settings that must be equal in all processes: all but those of a machine."""
    own = ("run.root", "data.path", "speed.device", "speed.threads", "speed.hw_decoder_load", "speed.decode")
    return {key: value for key, value in flatten(to_dict(config)).items() if key not in own}


def open_validation(config: Config) -> Dataset | None:
    """What is evaluated on, None where there is nothing."""
    if config.data.eval_split not in read_info(config.data.path).splits:
        return None
    catalogue = open_dataset(config.data.path, config.data.eval_split)
    return catalogue if len(catalogue) else None


def plan_words(
    config: Config, world: World, catalogue: Dataset, validation: Dataset | None, steps: int
) -> list[str]:
    """What is read and how batch and learning rate come about, in lines to print."""
    optim, repeats = config.optim, config.data.repeats
    micro, accumulate = micro_batches(config, world)
    length = f"{optim.epochs:g} epochs"
    if steps * optim.batch > Fraction(str(optim.epochs)) * len(catalogue):
        length += ", rounded up"
    lines = [
        f"data {config.data.path}: {len(catalogue)} training and {len(validation) if validation else 0} "
        f"validation {catalogue.info.kind}s, {len(catalogue.info.classes)} classes",
        *message(world.device, config.speed.threads),
        f"global batch {optim.batch} = {world.size} processes x {micro} micro x {accumulate} accumulated"
        f"{f', {repeats} rows of each sample' if repeats > 1 else ''}; lr {scaled_lr(optim):.3g} = "
        f"{optim.lr:.3g} x {optim.batch} / {optim.lr_batch}; {steps} steps = {length}",
    ]
    lines += clip_notes(catalogue, config.data) + pretraining_notes(config)
    if optim.batch > len(catalogue):
        times = optim.batch / len(catalogue)
        lines.append(f"a batch is {times:.1f} times the training data: lower optim.batch")
    if optim.warmup_epochs >= optim.epochs:
        lines.append(f"warmup takes {optim.warmup_epochs:g} epochs: the learning rate rises to the very end")
    if config.data.eval_split == "train":
        lines.append(f"evaluation is on the TRAINING {catalogue.info.kind}s: nothing is held out")
    return lines


def training_batches(
    config: Config, world: World, catalogue: Dataset, accumulate: int, start_step: int
) -> Iterator[Batch]:
    """This process's micro batches from `start_step` on."""
    steps = {"batch": config.optim.batch, "accumulate": accumulate, "start_step": start_step}
    return iter(TrainLoader(catalogue, config.data, config.speed, world, seed=config.run.seed, **steps))


def build_model(config: Config, classes: int = 0) -> nn.Module:
    """The model at the configured input size, a classifier of `classes`; raises UserError where none fits."""
    from models import create  # here: with timm it takes seconds, which a launcher can do without

    data, model = config.data, config.model
    settings: dict[str, object] = {
        "input_size": (data.size, data.size) if data.frames == 1 else (data.frames, data.size, data.size),
        "drop_path_rate": model.drop_path,
        "abs_win": model.abs_win,
        "checkpoint_stages": model.checkpoint_stages,
    }
    mae = isinstance(config, MaeConfig)
    if mae != model.name.startswith("mae_"):
        what = "MAE pretraining wants a mae_hiera_*" if mae else "finetuning wants a hiera_*"
        raise UserError(f"{what} model, not {model.name}; python -m models.zoo lists them")
    if isinstance(config, MaeConfig):
        settings |= {"decode_ratio": config.decode_ratio, "decoder_heads": config.decoder_heads or None}
    else:
        settings |= {"num_classes": classes, "head_dropout": model.dropout}
    try:
        return create(model.name, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def warm_start(model: nn.Module, config: Config, whole: bool = False, classes: Sequence[str] = ()) -> str:
    """Load `model.init` into the model, on demand all of it; returns the report of what was loaded.

    classes: the class names of the model's outputs, if known. Raises UserError where the weights do not fit.
    """
    from models import load_weights

    try:
        settings = config.model
        reuse = settings.reuse_encoder_norm
        report = load_weights(model, settings.init, reuse_encoder_norm=reuse, classes=classes, quiet=True)
    except ValueError as error:
        raise UserError(f"starting weights {config.model.init}: {error}") from error
    if whole and report.fresh:
        raise UserError(f"{report}; these weights are of another kind of model or other classes")
    return str(report)


def micro_batches(config: Config, world: World) -> tuple[int, int]:
    """(rows per forward, forwards per step) of each process; raises UserError if it does not divide.

    A forward takes whole groups of rows: the repeats of a sample, and with mixup or cutmix of two samples.
    """
    repeats, batch = config.data.repeats, config.optim.batch
    mixes = isinstance(config, FinetuneConfig) and (config.mixup or config.cutmix)
    group = repeats * (2 if mixes else 1)
    share, rest = divmod(batch, world.size * group)
    if rest:
        factors = f" x {repeats} repeats" if repeats > 1 else ""
        factors += " x 2 mixed samples" if mixes else ""
        raise UserError(
            f"optim.batch {batch} does not divide by {world.size} processes{factors}; "
            f"use a multiple of {world.size * group}"
        )
    most = max(1, min(config.speed.micro_batch // group, share))
    micro = next(m for m in range(most, 0, -1) if share % m == 0)
    return micro * group, share // micro


def freeze(model: nn.Module, config: Config) -> str:
    """Stop what `freeze` names from learning; gives a line that says so, or an empty one."""
    if isinstance(config, MaeConfig) or config.freeze == "none":
        return ""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("norm.", "head.")))
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"frozen trunk: {learning:,} parameters learn, those of the last norm and the head"


def precision(config: Config, world: World) -> tuple[Autocast, str]:
    """What forward passes run under, and lines that say why and with which kernels."""
    kernels = "".join(f"\n{line}" for line in choose_kernels(config, world))
    asked, cuda = config.speed.precision, world.device.type == "cuda"
    if asked == "bf16" or (asked == "auto" and cuda):
        reason = "asked for" if asked == "bf16" else "the default on CUDA; no loss scaling needed"
        words = f"precision bf16 autocast: {reason}{kernels}"
        return lambda: torch.autocast(world.device.type, torch.bfloat16), words
    # PyTorch lets convolutions use TF32 by default, matrix products not: here it is both or none.
    torch.set_float32_matmul_precision("high" if asked == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = asked == "tf32"
    reason = "the default on the CPU" if asked == "auto" else "asked for"
    return contextlib.nullcontext, f"precision {'tf32' if asked == 'tf32' else 'fp32'}: {reason}{kernels}"


def step_operations(model: nn.Module, config: Config) -> float:
    """Floating-point operations of a step over all processes: forward, and twice that backward."""
    from models.macs import forward_macs

    mae = isinstance(config, MaeConfig)
    macs = forward_macs(model.config, mae, config.mask_ratio if mae else 0.0)  # pyrefly: ignore
    frozen = isinstance(config, FinetuneConfig) and config.freeze == "trunk"
    return (2 if frozen else 6) * macs * config.optim.batch


def check_masking(config: MaeConfig, model: nn.Module) -> tuple[int, int]:
    """(mask units, units kept) of a sample; raises UserError for an impossible ratio."""
    units = getattr(model, "num_mask_units", 0)
    kept = int(units * (1 - config.mask_ratio))
    if not 0 < kept < units:
        raise UserError(
            f"mask_ratio {config.mask_ratio} keeps {kept} of {units} mask units; keep at least 1 and hide 1"
        )
    return units, kept
