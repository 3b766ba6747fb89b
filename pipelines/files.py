"""Writes that are either whole or absent: temporary name, fsync, rename, fsync of the folder; checksums."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NOTHING_LEFT = 64 << 10  # free bytes below which a failed write is put down to a full disk
_MASK = os.umask(0)  # there is no way to ask for it without setting it
os.umask(_MASK)
MODE = 0o666 & ~_MASK


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; on success it takes `path`'s place, durably.

    On an exception the temporary file is removed and `path` is left as it was; where the disk is full it
    becomes the OSError that says so.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        temporary.chmod(MODE)  # some writers make files that only their owner can read
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        full = temporary.exists() and shutil.disk_usage(path.parent).free < NOTHING_LEFT
        full |= os.strerror(errno.ENOSPC) in str(error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if full and isinstance(error, Exception):  # each library has its own words for it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def atomic_text(path: Path, text: str) -> None:
    """`atomic_write` of a text in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut after this call cannot undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
