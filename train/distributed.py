"""Processes and devices: starting them, summing over them, and stopping all of them at the same step."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipelines.errors import UserError
from pipelines.machine import usable_cores

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def under_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def resolve_device(name: str, processes: int) -> str:
    """ "cuda" or "cpu" for `processes` on this machine; raises UserError when the GPUs do not suffice."""
    if name not in ("auto", "cuda", "cpu"):
        raise UserError(f"speed.device is '{name}'; it can be auto, cuda or cpu")
    if processes < 1:
        raise UserError(f"speed.processes (GPUS) is {processes}; it must be at least 1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0 and processes == 1):
        return "cpu"
    if processes > gpus:
        raise UserError(
            f"{processes} GPUs were asked for and this machine has {gpus}; ask for fewer, or add DEVICE=cpu "
            f"(--speed.device cpu) to run the same {processes} processes on the CPU"
        )
    return "cuda"


def launch(processes: int, restarts: int) -> None:
    """Run this same command in `processes` processes by torchrun's engine and exit with their status.

    When one of them fails all are ended, and started again up to `restarts` times.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    module = sys.modules["__main__"].__spec__
    name = module.name if module else sys.argv[0]
    counts = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    arguments = ["--standalone", *counts, "-m", name, *sys.argv[1:]]
    # One thread pool per process that together fill the machine; torchrun would otherwise force one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    # A store that outlives a restart gives gloo the addresses of processes that are gone: one a start.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(next((code for code in codes if code > 0), 1))
    except SignalException as error:  # passed on to the processes, which have saved
        sys.exit(128 + error.sigval)
    sys.exit(0)


def start(device: str, timeout: float = 600.0) -> World:
    """Join the process group that torchrun described, or be a world of one.

    timeout: seconds that a process waits for the others before it gives up.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    local = local_rank()
    kind = resolve_device(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if kind == "cuda":
        torch.cuda.set_device(local)
    if under_torchrun():
        # A launcher that is killed outright must not leave its processes training on: they save and stop.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    return World(rank(), size, torch.device(kind, local) if kind == "cuda" else torch.device("cpu"))


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_another(error: Exception) -> bool:
    """Whether an error means that another process ended or does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


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


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class StopSignal:
    """SIGTERM, SIGINT or SIGUSR1 seen by any process, acted on by all of them at the same step.

    The processes exchange one flag per step in the background and read it a step later, so nothing waits.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.number = 0
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            self._group = dist.new_group(  # pyrefly: ignore
                backend="gloo", timeout=timedelta(seconds=timeout)
            )
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.number = number

    def agreed(self) -> int:
        """The signal's number once every process knows of it, else 0. Call it once per step."""
        if self._group is None:
            return self.number
        previous = self.wait()
        flag = torch.tensor([self.number])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, flag) if work is not None else None
        return previous

    def wait(self) -> int:
        """Finish the exchange under way; gives what it agreed on."""
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        work.wait()
        return int(flag.item())
