"""How a wrong use is answered: one sentence on stderr and exit code 2, never a traceback."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable

NO_PLACE = {  # errors of the place written to, and what to do about them
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may read and write",
    errno.ENOENT: "check the path, and that its folder exists",
    errno.ENAMETOOLONG: "choose a shorter name",
}
MEMORY = re.compile(  # what torch, CUDA, DALI, nvJPEG and nvImageCodec call an allocation that failed
    r"out of memory|can't allocate|failed to allocate|allocation failed|bad_alloc|ALLOCATOR_FAILURE|"
    r"cudaErrorMemoryAllocation|nvImageCodec failure: '#5'",
    re.IGNORECASE,
)
DEVICE = re.compile(  # what CUDA, DALI and nvJPEG say when the driver or the GPU failed
    r"CUDA (runtime|driver) API error|CUDA error|cudaError[A-Z]|driver version|nvJPEG error", re.IGNORECASE
)
INTERRUPTED = "interrupted; run the same command again to go on"


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what and how."""


def first_line(error: BaseException) -> str:
    """An error's text without what libraries append to it."""
    return str(error).partition("\n")[0]


def cause(error: BaseException) -> str:
    """What an error says, in one line, without what DALI puts around it."""
    text = str(error).rpartition("encountered:")[2]
    for appended in ("Stacktrace (", "Current pipeline object"):
        text = text.partition(appended)[0]
    return " ".join(text.split()) or type(error).__name__


def in_loader(error: BaseException) -> bool:
    """Whether DALI raised it."""
    return "Critical error in pipeline" in str(error) or "nvidia.dali" in str(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the device or the host, did not hold something."""
    return isinstance(error, MemoryError) or MEMORY.search(cause(error)) is not None


def of_machine(error: BaseException) -> bool:
    """Whether memory, the driver or the GPU failed, as no picture can cause it."""
    return out_of_memory(error) or DEVICE.search(cause(error)) is not None


def catch_ctrl_c_during_imports() -> None:
    """Answer Ctrl-C with one line and exit code 130 until `run_cli` takes over; for a package's __init__.

    Importing torch takes seconds, in which there is nothing to save, and libraries turn a KeyboardInterrupt
    into errors of their own. Does nothing unless `python -m` loads a command: only then is sys.argv[0] "-m".
    """
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)


def _exit_at_once(_number: int, _frame: object) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)


def run_cli(main: Callable[[], object]) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C 130.

    So does an OSError of a place that is full, closed or not there.
    """
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = sys.modules["__main__"].__spec__
    sys.argv[0] = f"python -m {spec.name}" if spec else sys.argv[0]  # what help texts call the command
    try:
        main()
    except (UserError, OSError, KeyboardInterrupt) as error:
        code = answer(error)
        if code is None:
            raise
        sys.exit(code)


def answer(error: BaseException) -> int | None:
    """Print the line that `run_cli` gives for an error, and return its exit code; None for other errors."""
    if isinstance(error, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
        return 130
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        place = f"{error.filename or 'the disk'}: {error.strerror}"
        error = UserError(f"{place}; {NO_PLACE[error.errno]}")
    if not isinstance(error, UserError):
        return None
    print(f"error: {error}", file=sys.stderr)
    return 2
