"""Processes and their devices: start processes, choose a device, and exchange values between ranks."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from pipelines.errors import UserError, first_line
from pipelines.machine import World, usable_cores
from train import ending

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NUMBERING = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # torchrun's variables that number the processes
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")  # those that say where they meet
START_OR_UNSET = "start the command with torchrun, which sets all of them, or unset them"

T = TypeVar("T")


def under_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process.

    Raises UserError when some of the variables are set and others are missing, empty or no number.
    """
    if not set(NUMBERING) & set(os.environ):
        return False
    several = os.environ.get("WORLD_SIZE") not in (None, "", "1")
    needed = (*NUMBERING, *(MEETING_POINT if several else ()))
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(
            f"of torchrun's variables, the environment lacks {', '.join(missing)}; {START_OR_UNSET}"
        )
    for name in (*NUMBERING, "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value, least = os.environ.get(name, "1"), int("SIZE" in name)
        if not value.isdecimal() or int(value) < least:
            raise UserError(f"{name} is '{value}', not a number of at least {least}; {START_OR_UNSET}")
    if rank() >= (size := int(os.environ["WORLD_SIZE"])):
        raise UserError(f"RANK is {rank()} of WORLD_SIZE {size} processes; {START_OR_UNSET}")
    return True


def local_rank() -> int:
    """This process's rank among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


# ---- devices


def resolve_device(name: str, processes: int) -> str:
    """ "cuda" or "cpu" for `processes` on this machine; raises UserError when it has too few GPUs."""
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"speed.device is '{name}'; it can be auto, cuda or cpu")
    if processes < 1:
        raise UserError(f"speed.processes (GPUS) is {processes}; it must be at least 1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0 and processes == 1):
        return "cpu"
    if processes > gpus and not one_each(gpus):
        why = "" if gpus else f" ({cuda_problem()}; CUDA 13 requires driver 580 or newer)"
        raise UserError(
            f"the run needs {processes} GPUs, and this machine has {gpus}{why}; use fewer processes, or add "
            f"DEVICE=cpu (--speed.device cpu) to run the same {processes} processes on the CPU"
        )
    return "cuda"


def one_each(gpus: int) -> bool:
    """Whether the launcher shows each process only its own GPU, as Slurm does with --gpus-per-task=1."""
    return gpus == 1 and "LOCAL_RANK" in os.environ and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")


def index(local_rank: int) -> int:
    """The index of this process's GPU among the GPUs that it sees."""
    return 0 if one_each(torch.cuda.device_count()) else local_rank


def cuda_problem() -> str:
    """Why PyTorch can use no GPU, in its words, such as "Found no NVIDIA driver on your system"."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error).partition(". ")[0]
    return "no GPU is visible"


def device_text(world: World) -> str:
    """The device as text, with the reason if it is the CPU."""
    if world.device.type == "cuda":
        return f"CUDA, {torch.cuda.get_device_name(world.device)}"
    why = "" if torch.cuda.is_available() else f" ({cuda_problem()})"
    return f"the CPU{why}, {torch.get_num_threads()} threads each"


def torch_threads(world: World) -> int:
    """The number of CPU threads for this process: on the CPU its share of the machine's cores."""
    if world.device.type == "cuda":
        return torch.get_num_threads()
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---- starting


def launch(processes: int, restarts: int) -> None:
    """Run this command in `processes` processes through torchrun's own `run`, and exit with their status.

    If one process fails, torchrun ends all of them and starts them again, up to `restarts` times.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    module = sys.modules["__main__"].__spec__  # None: a script, as of own recipes
    command = ["-m", module.name] if module else [sys.argv[0]]
    counts = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    # If SIGHUP is ignored, as under nohup, it must stay ignored; torchrun would handle it.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT"] if ignored else []
    saving = "--shutdown-timeout=240"  # seconds to save; torchrun's own 30 are too few for a large model
    arguments = ["--standalone", *counts, *handled, saving, *command, *sys.argv[1:]]
    # The processes share the cores; without this torchrun sets one thread per process.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    # Each start needs its own store: an old one gives gloo the addresses of processes that have ended.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(next((code for code in codes if code > 0), 1))
    except SignalException as error:  # torchrun passed the signal on, and the processes have saved
        sys.exit(128 + error.sigval)
    sys.exit(0)


def start(device: str, timeout: float = 600.0) -> World:
    """Join the process group of torchrun's variables; without them this process trains alone.

    timeout: seconds that a process waits for the others before it gives up. Raises UserError when torchrun's
    variables are incomplete or a GPU is missing.
    """
    joins = under_torchrun()
    size = int(os.environ["WORLD_SIZE"]) if joins else 1
    kind = resolve_device(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    place = torch.device(kind, index(local_rank())) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if joins:
        # If the launcher is killed, its processes must not train on without it: they save and stop.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        ending.watch(rank(), timeout)
    world = World(rank(), size, place)
    torch.set_num_threads(torch_threads(world))
    return world


# ---- exchange between ranks


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(values: torch.Tensor) -> torch.Tensor:
    """Every process's tensor [n] as [processes, n]."""
    if not dist.is_initialized():
        return values[None]
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def gather_objects(value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def on_rank_0(world: World, function: Callable[[], T]) -> T | None:
    """The result of `function` on rank 0, None on the others. If it raises UserError, all processes end.

    Only rank 0 raises the error, so that it is printed once; the other processes exit with the same code, 2.
    """
    result, failure = None, ""
    if world.is_main:
        try:
            result = function()
        except UserError as error:
            failure = str(error)
    if failure := broadcast(failure):
        fail(world, failure)
    return result


def fail(world: World, sentence: str) -> NoReturn:
    """End the process: with a UserError on rank 0, silently on the others. All processes must call it."""
    if world.is_main:
        raise UserError(sentence)
    sys.exit(2)


def broadcast(value: T) -> T:
    """Rank 0's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def check_agreement(world: World, what: str, value: object, advice: str) -> None:
    """End all processes, with a UserError on rank 0, unless `value` is equal on all ranks."""
    values = gather_objects(value)
    others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
    if others:
        fail(world, f"{what} of rank {', '.join(others)} differ from those of rank 0; {advice}")
