"""Walk the folders of sources; read the samples of one: repeat failed reads, try other files of the video."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from pipelines.errors import UserError
from tools.images import TRANSIENT, BadImage, Packed

PAUSES = (0.2, 1.0, 5.0)  # seconds before a failed read is repeated
IGNORED = frozenset({"@eaDir", "#recycle", "__MACOSX", "lost+found"})  # folders that systems add
SYSTEM_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})

Part = Packed | BadImage  # a sample, or the reason why a part of a source is rejected
Read = Callable[[str], Iterator[Part]]  # the samples of a path below the source folder


def walk(top: Path) -> Iterator[Path]:
    """Every file of `walk_folders` that is not hidden."""
    return (folder / name for folder, files in walk_folders(top) for name in files if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """True for the name of a file that is hidden, or that a system adds."""
    return name.startswith(".") or name in SYSTEM_FILES


def walk_folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `top` on with the names of its files; links are followed. Raises `UserError`.

    Hidden folders are left out, and those that systems add.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be listed: {error.strerror}; check its permissions."
        ) from error

    for folder, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        here = Path(folder)
        if any(here.samefile(parent) for parent in here.parents if parent.is_relative_to(top)):
            folders.clear()  # a link back to a folder above would never end
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in IGNORED]
        yield here, files


def read_source(read: Read, paths: Sequence[str], pauses: Sequence[float]) -> Iterator[tuple[str, Part]]:
    """(path, sample) for each sample of the first of `paths` that can be packed.

    Raises `BadImage`, with the reason of the first path, or `OSError`.
    """
    problems: list[BadImage] = []
    started = False
    for path in paths:
        try:
            for part in repeated(read, path, pauses):
                started = True
                yield path, part
            return
        except BadImage as error:
            if started:
                raise
            problems.append(error)
    raise problems[0]


def repeated(read: Read, path: str, pauses: Sequence[float]) -> Iterator[Part]:
    """Read a path; if the storage fails, read it again after each of the `pauses` (seconds).

    Raises `BadImage` or `OSError`.
    """
    count = 0  # of the samples that an earlier try has read
    for pause in (*pauses, None):
        try:
            for part in islice(read(path), count, None):
                count += 1
                yield part
            return
        except OSError as error:
            if pause is None or error.errno not in TRANSIENT:
                raise
        time.sleep(pause)
