"""How a step is computed: attention's kernels, deterministic ones, compilation, gradients over processes."""

import contextlib
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.inputs import NormalizedInput
from pipelines.errors import first_line
from pipelines.machine import usable_cores
from train.config import Config
from train.distributed import World

Autocast = Callable[[], contextlib.AbstractContextManager]
ATTENTION = {  # speed.attention -> the kernels that PyTorch may take: flash, efficient, cuDNN
    "auto": (True, True, False),
    "flash": (True, False, False),
    "efficient": (False, True, False),
    "cudnn": (False, False, True),
    "math": (False, False, False),
}


def choose_kernels(config: Config, world: World) -> list[str]:
    """Let PyTorch take the kernels that the settings ask for; gives lines that say which.

    It holds for the whole process: a compiled graph would break at a context manager.
    """
    asked, deterministic = config.speed.attention, config.speed.deterministic
    flash, efficient, cudnn = ATTENTION[asked]
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    lines = []
    if deterministic:
        # Nothing here reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        lines = ["deterministic kernels: on, slower; PyTorch warns of an operation that has none"]
    if asked != "auto":
        lines.append(f"attention: {asked}, as asked{'' if asked == 'math' else '; math where it cannot'}")
    elif world.device.type == "cuda":
        lines.append("attention: flash, the default; cuDNN's is off (--speed.attention cudnn turns it on)")
    return lines


def compile_model(
    model: NormalizedInput, config: Config, world: World, trial: Callable[[], Tensor], autocast: Autocast
) -> str:
    """Compile in place where that is wanted; where it fails, go on without. Gives a line that says what.

    trial: one forward pass on made-up data, giving the loss.
    """
    wanted = config.speed.compile == "yes" or (config.speed.compile == "auto" and world.device.type == "cuda")
    if not wanted:
        why = "as asked" if config.speed.compile == "no" else "the default on the CPU"
        return f"torch.compile: off, {why}"
    share_compile_workers()
    model.compile(fullgraph=True)
    begin = time.perf_counter()
    try:
        with autocast():
            loss = trial()
        loss.backward()
        return f"torch.compile: on, ready after {time.perf_counter() - begin:.0f} s"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo, Inductor, Triton, ptxas and their subprocesses have no common class
        model._compiled_call_impl = None
        reason = first_line(error).strip() or type(error).__name__
        return f"torch.compile: FAILED ({reason}); going on without it, slower"
    finally:
        model.zero_grad(set_to_none=True)


def share_compile_workers() -> None:
    """Let the processes of this machine together start as many compile workers as it has cores."""
    import torch._inductor.config  # here: it takes a while, and most commands compile nothing

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch._inductor.config.compile_threads = max(1, min(32, share))


def join(model: NormalizedInput, world: World) -> nn.Module:
    """The model as all processes train it together."""
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
