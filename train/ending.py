"""How processes that train together end: after success together, after an error of one all of them soon."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed as dist

from pipelines.errors import answer

FAILED = "hiera-train/failed"  # a key of the store that all processes share
POLL, GRACE = 1.0, 5.0  # seconds from look to look, and from another's failure to this process's end
SENTENCE = "another process failed; see its error, then run the same command to resume"

T = TypeVar("T")


class Watch:
    """Ends this process soon after another one failed.

    It works in a thread of its own: while the main thread waits in a collective, or for a GPU that does, it
    notices neither signals nor errors.
    """

    def __init__(self, rank: int, store: dist.Store) -> None:
        self._rank, self._store, self._over = rank, store, threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer; for a process that ends by itself."""
        self._over.set()

    def report(self) -> None:
        """Let the other processes know that this one failed."""
        self.stop()
        # The store may be gone, or its network: no reason to stay.
        thread = threading.Thread(target=self._report, daemon=True)
        thread.start()
        thread.join(GRACE)

    def _report(self) -> None:
        with suppress(RuntimeError):
            self._store.set(FAILED, str(self._rank))

    def _run(self) -> None:
        while not self._over.wait(POLL):
            if self._another_failed():
                break
        # A process that notices by itself has a better sentence, and one that has just finished needs none.
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
    """Begin to look after the others, once there is a process group.

    timeout: seconds that the network may be gone.
    """
    global _watch
    # A connection of its own: on the group's a waiting `get` would keep everything else out.
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=timeout))
    _watch = Watch(rank, store)


def finish_first(function: Callable[[], object]) -> None:
    """Have `function` called before this process exits because of an error, as for a file half written."""
    if dist.is_initialized():
        _unfinished.append(function)


def end_together(main: Callable[[], T]) -> T:
    """The result of `main`, after which the process leaves its process group.

    When `main` raises in one of several processes, the group cannot be left: NCCL would wait for the others,
    and they wait for this one. So the process prints the error, lets the others know, and exits at once,
    with the code that `run_cli` would give; the others follow within POLL + GRACE.
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


def _fail(error: BaseException) -> NoReturn:
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else answer(error)
    if code is None:
        traceback.print_exception(error)
        code = 1
    if _watch is not None:
        _watch.report()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End the process without the cleaning up that could wait for other processes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    for function in _unfinished:
        with suppress(Exception):
            function()
    os._exit(code)
