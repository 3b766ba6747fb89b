"""How processes that train together end: at the same step after a signal, and soon after an error of one."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from pipelines.errors import UserError, answer, cause, in_loader, out_of_memory, printable
from train.config import SpeedConfig

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FAILED = "hiera-train/failed"  # a key of the store that all processes share
POLL, GRACE = 1.0, 5.0  # seconds between two checks, and from another's failure to this process's end
STAY = 2.0  # seconds that a failed process stays, for others that fail at the same time
SENTENCE = "another process failed; see its error, then run the same command to resume"

T = TypeVar("T")


# ---- signals


class Stopped(Exception):
    """A signal ended the evaluation; its argument is the signal's number."""


class StopSignal:
    """A signal in STOPPING that any process received; all processes act on it at the same step.

    Each call of `agreed` starts an exchange of one flag in the background and reads the exchange before it,
    so that no process waits. A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    def __init__(self, timeout: float) -> None:
        """timeout: seconds that an exchange may take."""
        self.number = 0
        self._prints = os.environ.get("LOCAL_RANK", "0") == "0"
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
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
        """Runs between two instructions of the main thread, where print may not be called: hence os.write."""
        # torchrun passes the first Ctrl-C on as SIGINT and the second as SIGTERM.
        if self.number == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + signal.SIGINT)
        if not self.number and self._prints:
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

    def check(self) -> None:
        """`agreed` for use inside an evaluation: raises Stopped."""
        if number := self.agreed():
            raise Stopped(number)

    def wait(self) -> int:
        """Finish the exchange that is under way and return the signal's number, or 0."""
        if self._pending is None:
            return 0
        work, flag = self._pending
        self._pending = None
        work.wait()
        return int(flag.item())

    def restore(self) -> None:
        """Restore the signal handlers that were there before.

        With several processes the handlers stay: torchrun may repeat a signal until the last process has
        ended.
        """
        if self._group is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)


# ---- errors


class Watch:
    """Ends this process soon after another one failed.

    It runs in its own thread: while the main thread waits in a collective, or for a GPU that waits in one, it
    notices neither signals nor errors.
    """

    def __init__(self, rank: int, store: dist.Store) -> None:
        self._rank, self._store, self._over = rank, store, threading.Event()
        self._first = ""  # the rank and the error of the process that failed first
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching, because this process ends by itself."""
        self._over.set()

    def report(self, error: str) -> bool:
        """Tell the other processes that this one failed; return whether another failed first, equally."""
        self.stop()
        error = printable(error)  # the store takes UTF-8 only
        # The store or its network may be gone; this process must end all the same.
        thread = threading.Thread(target=self._report, args=(error,), daemon=True)
        thread.start()
        thread.join(GRACE)
        rank, _, first = self._first.partition(" ")
        return first == error and rank != str(self._rank)

    def _report(self, error: str) -> None:
        with suppress(RuntimeError):
            self._first = self._store.compare_set(FAILED, "", f"{self._rank} {error}").decode()

    def _run(self) -> None:
        while not self._over.wait(POLL):
            if self._another_failed():
                break
        # If this process notices the failure itself, its own error is more useful than SENTENCE.
        if not self._over.wait(GRACE):
            print(f"error: process {self._rank}: {SENTENCE}", file=sys.stderr, flush=True)
            _exit(2)

    def _another_failed(self) -> bool:
        try:
            return self._store.check([FAILED])
        except RuntimeError:  # the process that holds the store has ended
            return True


_watch: Watch | None = None
_unfinished: list[Callable[[], object]] = []


def watch(rank: int, timeout: float) -> None:
    """Start to watch the other processes; call it once there is a process group.

    timeout: seconds that the network may be gone.
    """
    global _watch
    # The watch needs its own connection: on the group's connection a waiting `get` blocks all other calls.
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=timeout))
    _watch = Watch(rank, store)


def finish_first(function: Callable[[], object]) -> None:
    """Call `function` before this process exits because of an error, for example to complete a file."""
    if dist.is_initialized():
        _unfinished.append(function)


def end_together(main: Callable[[], T]) -> T:
    """The result of `main`, after which the process leaves its process group.

    When `main` raises in one of several processes, the process cannot leave the group: NCCL would wait for
    the others, and they wait for this one. The process tells the others, prints the error, and exits after
    STAY with the code that `run_cli` gives. The others exit within POLL + GRACE; one with the same error for
    the user does not repeat it.
    """
    global _watch
    try:
        result = main()
    except BaseException as error:
        if not dist.is_initialized():
            raise
        _fail(error)
    if _watch is not None:
        _watch.stop()
        _watch = None
    _unfinished.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def explained(error: RuntimeError | MemoryError, speed: SpeedConfig) -> str:
    """A sentence for an error of the machine, with what to do about it; empty for an error of the code."""
    if out_of_memory(error):
        return (
            f"a step does not fit into memory ({cause(error).partition('. ')[0].rstrip('.')}); lower "
            f"speed.micro_batch ({speed.micro_batch}), which does not change the result, or set "
            f"model.checkpoint_stages{', or lower speed.threads' if in_loader(error) else ''}"
        )
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return (
            f"process {os.environ.get('RANK', 0)}: another process ended, or did not answer for "
            f"{speed.timeout:g} s (speed.timeout); see its error, then run the same command to resume from "
            "the last checkpoint"
        )
    return ""


def _fail(error: BaseException) -> NoReturn:
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else None
    if _watch is not None and _watch.report(str(error)) and isinstance(error, UserError):
        code = 2  # the first process with this error prints it
    elif code is None and (code := answer(error)) is None:
        traceback.print_exception(error)
        code = 1
    if _watch is not None:
        # If this process has the store, the others need it. If it printed nothing, torchrun could end the one
        # that prints when this one ends.
        time.sleep(STAY)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Exit without the clean-up that could wait for other processes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    for function in _unfinished:
        with suppress(Exception):
            function()
    os._exit(code)
