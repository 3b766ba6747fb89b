"""Builds the parts of a run from its configuration: precision, batch, starting weights, compilation."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers import NormalizedInput
from pipelines.dataset import Dataset, check_shards, read_info
from pipelines.errors import UserError, first_line
from pipelines.loader import Batch, TrainLoader
from pipelines.machine import usable_cores
from pipelines.views import check_info
from train import checkpoint, distributed
from train.checkpoint import State
from train.config import Config, ModelConfig, SpeedConfig
from train.console import log
from train.distributed import World
from train.meters import Meters
from train.optim import checkpoint_bytes, make_ema, make_optimizer, scaled_lr, total_steps, warmup_steps
from train.rundir import Run
from train.task import Task

Autocast = Callable[[], contextlib.AbstractContextManager]
ATTENTION = {  # speed.attention -> the kernels that PyTorch may use: flash, efficient, cuDNN
    "auto": (True, True, False),
    "flash": (True, False, False),
    "efficient": (False, True, False),
    "cudnn": (False, False, True),
    "math": (False, False, False),
}


def check(config: Config) -> None:
    """Find what can be wrong before any process starts; raises UserError."""
    if not config.run.name:
        raise UserError(f"run.name is ''; it must name a folder below {config.run.root}")
    info = read_info(config.data.path)
    check_info(info, config.data, getattr(config, "views", (1, 1))[0])
    if "train" not in info.splits:
        raise UserError(f"{config.data.path} has no train split; pack one with tools.pack")
    if not info.splits["train"]["samples"]:
        raise UserError(f"{info.root} has no readable train sample; {info.catalogue('train')} says why")
    check_shards(info)
    check_init(config)
    distributed.resolve_device(config.speed.device, config.speed.processes)


def check_init(config: Config) -> None:
    """Raise UserError if the starting weights are a path without weights, unless the run will resume."""
    from models.files import find_weights, is_official, path_of

    init = config.model.init
    if init and not is_official(init) and not any(config.run.folder.glob("checkpoints/step-*.pt")):
        try:
            find_weights(path_of(init))
        except UserError as error:
            raise UserError(f"starting weights: {error}") from error


def build(config: Config, task: Task, run: Run) -> State:
    """Set the precision, load the starting weights, and make optimizer and moving average."""
    device = run.world.device
    set_precision(config.speed, device)
    if config.model.init and run.newest is None:
        warm_start(task.model, config.model, task.training.info.classes)
    log_plan(config, task, run.world)
    parameters = sum(p.numel() for p in task.model.parameters())
    size = checkpoint_bytes(task.model, config.optim) / 1e6
    log(f"model {config.model.name}: {parameters / 1e6:.1f} M parameters, {size:,.0f} MB per checkpoint")
    model = task.model.to(device)
    return State(model, make_optimizer(model, config.optim), make_ema(model, config.optim), Meters(device))


# ---- batches


def resume(config: Config, task: Task, run: Run, state: State) -> None:
    """Restore the checkpoint that rank 0 chose; ends the run unless all processes have the same state."""
    steps = total_steps(config.optim, len(task.training))
    if run.newest is not None:
        state.restore(checkpoint.load(run.newest, run.world.device), run.world)
        log(f"resumed from step {state.step} of {steps}")
    checksums = state.checksums().tolist()
    if state.step > steps:
        distributed.fail(
            run.world,
            f"{run.folder} is already at step {state.step}, but optim.epochs {config.optim.epochs:g} ends at "
            f"step {steps}; raise optim.epochs, or choose another RUN",
        )
    distributed.check_agreement(
        run.world,
        "weights or optimizer state",
        checksums,
        f"are {run.folder} and the starting weights the same files on every machine?",
    )


def micro_batches(config: Config, processes: int, mixed: int = 1) -> tuple[int, int]:
    """(rows per forward, forwards per step) of each process; raises UserError if the batch does not divide.

    A forward takes whole groups of rows: the repeats of a sample, and `mixed` samples that are mixed with
    each other.
    """
    repeats, batch = config.data.repeats, config.optim.batch
    group = repeats * mixed
    share, rest = divmod(batch, processes * group)
    if rest:
        factors = f" x {repeats} repeats" if repeats > 1 else ""
        factors += f" x {mixed} mixed samples" if mixed > 1 else ""
        raise UserError(
            f"optim.batch {batch} is not divisible by {processes} processes{factors}; "
            f"use a multiple of {processes * group}"
        )
    most = max(1, min(config.speed.micro_batch // group, share))
    micro = next(m for m in range(most, 0, -1) if share % m == 0)
    return micro * group, share // micro


def log_memory(micro: int, accumulate: int, device: torch.device) -> None:
    """Log what a step took on a GPU, and if it has several micro batches, which size of them would fit.

    What the step took beyond its weights is divided by its rows. It includes the gradients, so that more
    rows may fit than this says. A tenth of the memory stays free.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    kept, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    others = total - free - torch.cuda.memory_reserved(device)  # DALI, NCCL and other processes
    most = min(int((0.9 * total - others - kept) / max(1, peak - kept) * micro), micro * accumulate)
    advice = f"; about {most} would fit (--speed.micro_batch) and may be faster" if most > micro else ""
    used = f"{(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB"
    log(f"GPU memory: {used} at {micro} rows per forward{advice}")


def training_batches(
    config: Config, world: World, dataset: Dataset, accumulate: int, start_step: int
) -> Iterator[Batch]:
    """This process's micro batches from `start_step` on, endless."""
    steps = {"batch": config.optim.batch, "accumulate": accumulate, "start_step": start_step}
    return iter(TrainLoader(dataset, config.data, config.speed, world, seed=config.run.seed, **steps))


def log_plan(config: Config, task: Task, world: World) -> None:
    """Log the batch, the learning rate and the number of steps, with warnings."""
    optim, repeats = config.optim, config.data.repeats
    micro, accumulate = micro_batches(config, world.size, task.mixed)
    samples = len(task.training)
    steps = total_steps(optim, samples)
    length = f"{optim.epochs:g} epoch{'s' * (optim.epochs != 1)}"
    if steps * optim.batch > Fraction(str(optim.epochs)) * samples:
        length += ", rounded up"
    log(
        f"global batch {optim.batch} = {world.size} processes x {micro} micro x {accumulate} accumulated"
        f"{f', {repeats} rows of each sample' if repeats > 1 else ''}; lr {scaled_lr(optim):.3g} = "
        f"{optim.lr:.3g} x {optim.batch} / {optim.lr_batch}; {steps} step{'s' * (steps != 1)} = {length}"
    )
    if optim.batch > (rows := samples * repeats):
        log(
            f"a batch is {optim.batch / rows:.1f} times the training data: lower optim.batch to at most "
            f"{rows} (the learning rate is scaled with it), or every step sees samples more than once"
        )
    if warmup_steps(optim, samples) >= steps or optim.warmup_epochs >= optim.epochs:
        log(
            f"warmup takes {optim.warmup_epochs:g} epochs: the learning rate rises to the very end, and is 0 "
            f"in the first of {steps} steps; set optim.warmup_epochs further below optim.epochs "
            f"({optim.epochs:g}), or to 0"
        )


# ---- weights


def seed_weights(seed: int) -> None:
    """Seed torch's generator, which initializes the weights.

    A training step does not use it: its draws follow from (seed, step or epoch, sample) alone.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, 0, 0]).generate_state(1, np.uint64)[0]))


def warm_start(
    model: nn.Module, settings: ModelConfig, classes: Sequence[str] = (), whole: bool = False
) -> None:
    """Load the weights `settings.init` and log which were loaded; `whole`: all of them must be.

    classes: the class names of the model's outputs, if known. Raises UserError when the weights do not fit.
    """
    from models import load_weights

    try:
        report = load_weights(
            model, settings.init, reuse_encoder_norm=settings.reuse_encoder_norm, classes=classes, quiet=True
        )
    except UserError as error:
        raise UserError(f"{'weights' if whole else 'starting weights'}: {error}") from error
    if whole and report.fresh:
        raise UserError(f"{report}; these weights are of another kind of model or other classes")
    log(str(report))


# ---- precision and kernels


def autocast_for(speed: SpeedConfig, device: torch.device) -> Autocast:
    """The context of forward passes: bf16 autocast, or nothing."""
    if speed.precision == "bf16" or (speed.precision == "auto" and device.type == "cuda"):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


def set_precision(speed: SpeedConfig, device: torch.device) -> None:
    """Set TF32 and the kernels of this process, and log the precision with its reason."""
    name, cuda = speed.precision, device.type == "cuda"
    if name == "bf16" or (name == "auto" and cuda):
        reason = "set by speed.precision" if name == "bf16" else "the default on CUDA; no loss scaling needed"
        log(f"precision bf16 autocast: {reason}")
    else:
        # By default PyTorch uses TF32 for convolutions and not for matrix products: here for both or neither.
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        reason = "the default on the CPU" if name == "auto" else "set by speed.precision"
        log(f"precision {'tf32' if name == 'tf32' else 'fp32'}: {reason}")
    choose_kernels(speed, device)


def choose_kernels(speed: SpeedConfig, device: torch.device) -> None:
    """Let PyTorch use only the kernels that the settings name, and log which.

    The choice is for the whole process, because a context manager would break a compiled graph.
    """
    flash, efficient, cudnn = ATTENTION[speed.attention]
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch._C._set_sdp_priority_order([3, 1, 2, 0, 4])  # cuDNN first; by default math is before it on an A100
    torch.use_deterministic_algorithms(speed.deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = speed.deterministic
    if speed.deterministic:
        # Filling costs time, and nothing here reads uninitialized memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        log("deterministic kernels: on, slower; PyTorch warns of an operation that has none")
    if speed.attention != "auto":
        fallback = "" if speed.attention == "math" else "; math where it cannot"
        log(f"attention: {speed.attention}, as set{fallback}")
    elif device.type == "cuda":
        log("attention: flash, the default; cuDNN's is off (--speed.attention cudnn turns it on)")


# ---- compilation and DDP


def compile_model(
    model: NormalizedInput, speed: SpeedConfig, device: torch.device, trial: Callable[[], Tensor]
) -> None:
    """Compile in place if the settings ask for it; if that fails, log the reason and train without.

    trial: one forward pass on a blank batch, giving the loss.
    """
    if not (speed.compile == "yes" or (speed.compile == "auto" and device.type == "cuda")):
        log(f"torch.compile: off, {'as set' if speed.compile == 'no' else 'the default on the CPU'}")
        return
    share_compile_workers()
    model.compile(fullgraph=True)
    begin = time.perf_counter()
    try:
        with autocast_for(speed, device)():
            loss = trial()
        loss.backward()
        log(f"torch.compile: on, ready after {time.perf_counter() - begin:.0f} s")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo, Inductor, Triton, ptxas and their subprocesses have no common class
        model._compiled_call_impl = None
        reason = first_line(error).strip() or type(error).__name__
        log(f"torch.compile: FAILED ({reason}); training continues without it, which is slower")
    finally:
        model.zero_grad(set_to_none=True)


def share_compile_workers() -> None:
    """Divide the machine's cores among the compile workers of its processes."""
    import torch._inductor.config  # here: it takes a while, and most commands compile nothing

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch._inductor.config.compile_threads = max(1, min(32, share))


def join(model: NormalizedInput, world: World) -> nn.Module:
    """The model with DDP's averaging of gradients, if there are several processes."""
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def arrange_buckets(model: nn.Module, autocast: Autocast, trial: Callable[[], Tensor]) -> None:
    """Let DDP arrange its buckets of gradients, which it does at the second step otherwise.

    The arrangement decides in which order three and more processes add their gradients. A resumed run would
    add those of its first step in another order than the run that it continues, and differ in the last bits.

    trial: one forward pass on a blank batch, giving the loss.
    """
    if isinstance(model, DistributedDataParallel):
        with autocast():
            loss = trial()
        loss.backward()
        model.zero_grad(set_to_none=True)
