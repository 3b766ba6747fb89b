"""How a wrong use is answered: one sentence on stderr and exit code 2, never a traceback."""

import errno
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

NO_PLACE = {  # errors of the place written to, and what to do about them
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may read and write",
    errno.ENOENT: "check the path, and that its folder exists",
    errno.EEXIST: "choose a folder, not a file",
    errno.ENOTDIR: "choose a folder, not a file",
    errno.EISDIR: "choose a file, not a folder",
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
INTERRUPTED = "interrupted; run the same command again to continue"
# The path of a remote file, also as `Path` writes it: with one slash.
REMOTE = re.compile(r"(?:s3a?|gs|gcs|hf|hdfs|abfss?|az|ftps?|https?):/")
# Escape sequences other than colors and cursor movements, control characters other than line ends, and the
# bytes of paths that are not UTF-8, which no stream takes.
CONTROLS = re.compile(
    r"\x1b(?!\[[0-9;?]*[A-HJKhlm])|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\ud800-\udfff]"
)
WRITTEN = ("--out", "--run.root", "target")  # flags of what a command writes
UNTIL_ENDED = 10.0  # seconds that torchrun may take to end a process after another one failed


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what and how."""


# What comes of reading settings from a damaged file.
UNREADABLE = (
    UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError,
)  # fmt: skip


def first_line(error: BaseException) -> str:
    """An error's text without what libraries append to it, and without the number of an OSError."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).partition("\n")[0]


def check_local(path: object, flag: str = "") -> None:
    """Raise UserError if `path`, the value of `flag`, is on an object store or a web server."""
    if not REMOTE.match(text := str(path)):
        return
    url = text if "://" in text else text.replace(":/", "://", 1)
    if flag in WRITTEN:
        fix = "give a local folder, and copy the result there with the store's own program"
    else:
        fix = (
            f"copy it to a local disk first: a packed dataset with make stage DATA='{url}' TO=FOLDER, "
            "other files with the store's own program"
        )
    raise UserError(f"{flag} {url} is not a local path; {fix}".lstrip())


def check_words(words: Sequence[str]) -> None:
    """`check_local` of every value on a command line. Raises UserError for one that is not UTF-8."""
    for before, word in zip(("", *words), words, strict=False):
        if word != word.encode(errors="replace").decode():  # pyarrow takes no such path
            raise UserError(f"{word} is not in UTF-8; rename that file or folder")
        flag, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        check_local(value, flag if flag.startswith("--") else "")


@contextmanager
def once_per_machine() -> Iterator[None]:
    """Of several processes on a machine, let only the first print an error of the block.

    The error must be the same in all of them, as for a wrong word on the command line.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    try:
        with redirect_stderr(StringIO()):
            yield
    except (UserError, SystemExit):
        time.sleep(UNTIL_ENDED)  # if this process ended now, torchrun might end the first before it prints
        sys.exit(2)


def printable(text: str) -> str:
    """The text without what could control a terminal: names in files of others may hold escape sequences."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def _guard(stream: Any) -> None:
    """Let a stream write only printable text; a second call changes nothing."""
    if not getattr(stream, "guarded", False):
        write = stream.write
        stream.guarded, stream.write = True, lambda text: write(printable(text))


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


def run_cli(main: Callable[[], object], remote: bool = False) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C 130.

    So do memory that is too small and an OSError of a place that is full, closed or not there. If the reader
    of the output ended, such as `head`, the exit code is 141, as in a shell. Unless the command takes
    `remote` paths, a word of the command line that is one raises `UserError`.
    """
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _guard(sys.stdout)
    _guard(sys.stderr)
    spec = sys.modules["__main__"].__spec__
    sys.argv[0] = f"python -m {spec.name}" if spec else sys.argv[0]  # what help texts call the command
    try:
        if not remote:
            with once_per_machine():
                check_words(sys.argv[1:])
        try:
            main()
        finally:
            if not isinstance(sys.exception(), Exception):  # of which the message is more important
                print(end="", flush=True)
    except (UserError, OSError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _unread(1):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes the rest when it ends
            sys.exit(141)
        code = answer(error)
        if code is None:
            raise
        sys.exit(code)


def _unread(descriptor: int) -> bool:
    """True if a descriptor is a pipe whose reader ended."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def answer(error: BaseException) -> int | None:
    """Print the line that `run_cli` gives for an error, and return its exit code; None for other errors."""
    if isinstance(error, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
        return 130
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        place = f"{error.filename or 'the disk'}: {error.strerror}"
        error = UserError(f"{place}; {NO_PLACE[error.errno]}")
    if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
        what = cause(error).partition(". ")[0].rstrip(".")
        gpu = "cuda" in what.lower() or DEVICE.search(what)
        advice = (
            "a GPU with more, or the CPU (DEVICE=cpu, --device cpu)" if gpu else "a machine with more memory"
        )
        error = UserError(f"memory is too small ({what}); use {advice}")
    if not isinstance(error, UserError):
        return None
    print(f"error: {error}", file=sys.stderr)
    return 2
