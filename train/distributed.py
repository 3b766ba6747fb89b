"""Processes and devices: starting them, summing over them, and stopping all of them at the same step."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from pipelines.errors import UserError
from pipelines.machine import World, usable_cores
from train import ending
from train.device import index, old_driver, resolve_device

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
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
    values = {name: os.environ.get(name, "") for name in NUMBERING}
    several = values["WORLD_SIZE"] not in ("", "1")
    needed = (*NUMBERING, *(MEETING_POINT if several else ()))
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        found = ", ".join(name for name in NUMBERING if values[name]) or "an empty one"
        raise UserError(
            f"{', '.join(missing)} missing from the environment, which has {found}; {START_OR_UNSET}"
        )
    for name in (*NUMBERING, "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value, least = os.environ.get(name, "1"), int("SIZE" in name)
        if not value.isdecimal() or int(value) < least:
            raise UserError(f"{name} is '{value}', not a number of at least {least}; {START_OR_UNSET}")
    if rank() >= int(values["WORLD_SIZE"]):
        raise UserError(f"RANK is {rank()} of WORLD_SIZE {values['WORLD_SIZE']} processes; {START_OR_UNSET}")
    return True


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def device_words(world: World) -> str:
    """The device in words, with the reason if it is the CPU."""
    if world.device.type == "cuda":
        return f"CUDA, {torch.cuda.get_device_name(world.device)}"
    why = "" if torch.cuda.is_available() else f" ({old_driver() or 'no CUDA device here'})"
    return f"the CPU{why}, {torch.get_num_threads()} threads each"


def torch_threads(world: World) -> int:
    """CPU threads of this process: its share of the machine, unless the device is a GPU."""
    if world.device.type == "cuda":
        return torch.get_num_threads()
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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
    # Under nohup SIGHUP is ignored; torchrun would handle it all the same.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT"] if ignored else []
    saving = "--shutdown-timeout=240"  # seconds to save; torchrun's own 30 are too few for a large model
    arguments = ["--standalone", *counts, *handled, saving, "-m", name, *sys.argv[1:]]
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

    timeout: seconds that a process waits for the others before it gives up. Raises UserError for incomplete
    variables of torchrun and for missing GPUs.
    """
    joins = under_torchrun()
    size = int(os.environ["WORLD_SIZE"]) if joins else 1
    kind = resolve_device(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    place = torch.device(kind, index(local_rank())) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if joins:
        # A launcher that is killed outright must not leave its processes training on: they save and stop.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        ending.watch(rank(), timeout)
    return World(rank(), size, place)


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


def on_rank_0(world: World, function: Callable[[], T]) -> T | None:
    """The result of `function` on rank 0, None elsewhere. If it raises UserError, all processes end.

    Only rank 0 raises it, so that the sentence is printed once; the others exit with its status, 2.
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
    """End a process with `sentence` on rank 0 and silently elsewhere; all processes must call it."""
    if world.is_main:
        raise UserError(sentence)
    sys.exit(2)


def broadcast(value: T) -> T:
    """Rank 0's value, in all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def check_agreement(world: World, what: str, value: object, advice: str) -> None:
    """End all processes, with UserError on rank 0, unless `value` is equal in all of them."""
    values: list[object] = [value]
    if dist.is_initialized():
        values = [None] * world.size
        dist.all_gather_object(values, value)
    others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
    if others:
        fail(world, f"{what} of rank {', '.join(others)} differ from those of rank 0; {advice}")


class Stopped(Exception):
    """A signal ended the evaluation; its argument is the signal's number."""


class StopSignal:
    """A signal in STOPPING seen by any process, acted on by all of them at the same moment.

    The processes exchange one flag per call of `agreed` in the background and read it one call later, so that
    nothing waits. A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.number = 0
        self._reports = local_rank() == 0
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            self._group = dist.new_group(  # pyrefly: ignore
                backend="gloo", timeout=timedelta(seconds=timeout)
            )
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        if self._before[signal.SIGHUP] == signal.SIG_IGN:
            del self._before[signal.SIGHUP]
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        """Runs between two instructions of whatever the process is doing, hence os.write."""
        # torchrun passes the first Ctrl-C on as SIGINT and the second as SIGTERM.
        if self.number == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + signal.SIGINT)
        if not self.number and self._reports:
            again = "; press Ctrl-C again to stop at once without saving" if number == signal.SIGINT else ""
            text = f"{signal.Signals(number).name}: stopping after this step and saving{again}\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        self.number = number

    def agreed(self) -> int:
        """The signal's number once every process knows of it, else 0. All must call it equally often."""
        if self._group is None:
            return self.number
        previous = self.wait()
        flag = torch.tensor([self.number])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, flag) if work is not None else None
        return previous

    def restore(self) -> None:
        """Give the signals back to whoever handled them before.

        Not among several processes: torchrun may repeat a signal until the last of them has ended.
        """
        if self._group is not None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """`agreed` for use inside an evaluation: raises Stopped."""
        if number := self.agreed():
            raise Stopped(number)

    def wait(self) -> int:
        """Finish the exchange under way and return what it agreed on."""
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        work.wait()
        return int(flag.item())
