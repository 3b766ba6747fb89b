"""A check's process: it ends in time, and so does every process that it has started."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
GRACE = 10.0  # seconds from a signal to the end of a process


def output_of(command: list[str], seconds: float) -> tuple[str, int | None]:
    """What a command prints, and its exit code, None after `seconds`. Then all its processes are killed.

    The processes that it waits for are aborted first: each prints where it is, and the command its answer.
    """
    others, code = children(), None
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process
    # Not a pipe, which is open until the last process that inherited it has ended.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for number in leaves(process.pid):
                send(number, signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        finally:
            kill(others)
        output.seek(0)
        return output.read(), code


def kill(others: set[int]) -> None:
    """Kill all descendants except the children `others`; gives up after GRACE if a driver holds one."""
    limit = time.monotonic() + GRACE
    while (left := children() - others) and time.monotonic() < limit:
        for number in left:
            send(number, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(number, os.WNOHANG)
        time.sleep(0.05)


def children(number: int | str = "self") -> set[int]:
    """The children of a process."""
    found: set[int] = set()
    for path in Path(f"/proc/{number}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found |= set(map(int, path.read_text().split()))
    return found


def leaves(number: int) -> list[int]:
    """The descendants of a process that have no children; the process itself if it has none."""
    return [leaf for child in children(number) for leaf in leaves(child)] or [number]


def send(number: int, sent: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, sent)


def last_line(printed: str) -> str:
    """The last sentence for the user in an output, or else its last line; after a crash also where it was."""
    text, _, crash = printed.partition("Fatal Python error: ")
    lines = [line for line in text.splitlines() if line.strip()]
    sentences = [line for line in lines if line.startswith("error: ")]
    where = re.search(r"Current thread [^\n]*\n\s*(File [^\n]*)", crash)
    return " ".join([(sentences or lines or ["no output"])[-1][:300], *(where.groups() if where else ())])
