"""From a configuration to the parts of a run: checks, device, precision, batches, model."""

import contextlib
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines import loader
from pipelines.catalogue import Catalogue, open_catalogue, read_info
from pipelines.errors import UserError
from pipelines.inputs import Normalised
from train import distributed, rundir
from train.config import Config, MaeConfig
from train.console import Screen
from train.distributed import World

Autocast = Callable[[], contextlib.AbstractContextManager]


def check(config: Config) -> None:
    """Find what can be wrong before any process starts; raises UserError."""
    info = read_info(config.data.path)
    wanted = "image" if config.data.frames == 1 else "video"
    if info.kind != wanted:
        other = "video-*" if info.kind == "video" else "image-*"
        raise UserError(
            f"{config.data.path} holds {info.kind} shards and this preset reads {wanted}s; "
            f"use a preset {other}"
        )
    if "train" not in info.splits:
        raise UserError(f"{config.data.path} has no train split; pack one with tools.pack_*")
    optim, run, speed = config.optim, config.run, config.speed
    at_least_one = {
        "optim.batch": optim.batch,
        "optim.lr_batch": optim.lr_batch,
        "speed.micro_batch": speed.micro_batch,
        "run.log_every": run.log_every,
        "run.eval_every": run.eval_every,
        "run.checkpoint_every": run.checkpoint_every,
        "run.keep": run.keep,
        "data.stride": config.data.stride,
        "data.repeats": config.data.repeats,
        "data.window": config.data.window,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{key} is {value}; it must be at least 1")
    if optim.epochs <= 0:
        raise UserError(f"optim.epochs is {optim.epochs}; it must be more than 0")
    for key, value, known in (
        ("speed.precision", speed.precision, ("auto", "bf16", "fp32")),
        ("speed.compile", speed.compile, ("auto", "yes", "no")),
        ("data.order", config.data.order, ("random", "local")),
    ):
        if value not in known:
            raise UserError(f"{key} is '{value}'; it can be {', '.join(known)}")
    distributed.resolve_device(speed.device, speed.processes)
    rundir.check_config(config)


def open_validation(config: Config) -> Catalogue | None:
    if "val" not in read_info(config.data.path).splits:
        return None
    catalogue = open_catalogue(config.data.path, "val")
    return catalogue if len(catalogue) else None


def view_spec(config: Config) -> loader.ViewSpec:
    """How samples are cut and augmented, as the loader wants it."""
    data = config.data
    return loader.ViewSpec(
        size=data.size,
        frames=data.frames,
        stride=data.stride,
        scale=data.scale,
        ratio=data.ratio,
        flip=data.flip,
        interpolation=data.interpolation,
        crop_fraction=data.crop,
        repeats=data.repeats,
        same_clip=data.same_clip,
        augment=data.augment,
    )


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
        raise UserError(f"{what} model, not {model.name}")
    if isinstance(config, MaeConfig):
        settings |= {"decode_ratio": config.decode_ratio, "decoder_heads": config.decoder_heads or None}
    else:
        settings |= {"num_classes": classes, "head_dropout": model.dropout}
    try:
        return create(model.name, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def warm_start(model: nn.Module, config: Config) -> str:
    """Load `model.init` into the model; returns the report of what was loaded. Raises UserError."""
    from models import load_weights

    try:
        settings = config.model
        return str(
            load_weights(model, settings.init, reuse_encoder_norm=settings.reuse_encoder_norm, quiet=True)
        )
    except ValueError as error:
        raise UserError(f"starting weights {config.model.init}: {error}") from error


def micro_batches(config: Config, world: World) -> tuple[int, int]:
    """(rows per forward, forwards per step) of each process; raises UserError if it does not divide."""
    repeats = config.data.repeats
    share, rest = divmod(config.optim.batch, world.size * repeats)
    if rest:
        times = f" x {repeats} repeats" if repeats > 1 else ""
        raise UserError(f"optim.batch {config.optim.batch} does not divide by {world.size} processes{times}")
    most = max(1, min(config.speed.micro_batch // repeats, share))
    micro = next(m for m in range(most, 0, -1) if share % m == 0)
    return micro * repeats, share // micro


def wrap(model: Normalised, config: Config, world: World, screen: Screen) -> nn.Module:
    """Compile, then DDP, where each applies."""
    wanted = config.speed.compile == "yes" or (config.speed.compile == "auto" and world.device.type == "cuda")
    if wanted:
        screen.line("torch.compile: on (the first step takes a while)")
        model.compile(fullgraph=True)
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def precision(config: Config, world: World) -> tuple[Autocast, str]:
    bf16 = config.speed.precision == "bf16" or (
        config.speed.precision == "auto" and world.device.type == "cuda"
    )
    if bf16:
        reason = (
            "asked for" if config.speed.precision == "bf16" else "the default on CUDA; no loss scaling needed"
        )
        return lambda: torch.autocast(world.device.type, torch.bfloat16), f"precision bf16 autocast: {reason}"
    reason = "asked for" if config.speed.precision == "fp32" else "the default on the CPU"
    return contextlib.nullcontext, f"precision fp32: {reason}"


def device_words(world: World) -> str:
    if world.device.type == "cuda":
        return f"CUDA, {torch.cuda.get_device_name(world.device)}"
    why = "" if torch.cuda.is_available() else " (no CUDA device here)"
    return f"the CPU{why}, {torch.get_num_threads()} threads each"


def torch_threads(world: World) -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, (os.cpu_count() or 1) // local) if world.device.type == "cpu" else torch.get_num_threads()


def check_masking(config: MaeConfig, model: nn.Module) -> tuple[int, int]:
    """(mask units, units kept) of a sample; raises UserError for an impossible ratio."""
    units = getattr(model, "num_mask_units", 0)
    kept = int(units * (1 - config.mask_ratio))
    if not 0 < kept < units:
        raise UserError(
            f"mask_ratio {config.mask_ratio} keeps {kept} of {units} mask units; keep at least 1 and hide 1"
        )
    return units, kept
