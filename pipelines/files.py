"""Files: writes that are either whole or absent, checksums, locks.

Such a write is: temporary name, fsync, rename, fsync of the folder.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from stat import S_ISREG
from struct import error as StructError
from struct import unpack_from
from typing import IO, TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# What file systems answer to a call that they do not have: NFS, Lustre, CIFS and FUSE differ in it.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM})
NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
NOTHING_LEFT = 64 << 10  # free bytes below which a failed write is put down to a full disk
_MASK = os.umask(0)  # there is no way to ask for it without setting it
os.umask(_MASK)
MODE = 0o666 & ~_MASK


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; on success it takes `path`'s place, durably.

    On an exception the temporary file is removed and `path` is left as it was. An OSError names `path`; where
    the disk is full it says so. Raises UserError where the file system cannot rename.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # a link of this name would lead the writer elsewhere
        yield temporary
        with ignored(UNSUPPORTED):
            temporary.chmod(MODE)  # some writers make files that only their owner can read
        sync(temporary)
        rename(temporary, path)
        sync(path.parent)
    except BaseException as error:
        full = temporary.exists() and shutil.disk_usage(path.parent).free < NOTHING_LEFT
        full |= os.strerror(errno.ENOSPC) in str(error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if full and isinstance(error, Exception):  # each library has its own words for it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if isinstance(error, OSError) and error.errno and temporary.name in f"{error} {error.filename}":
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def atomic_text(path: Path, text: str) -> None:
    """`atomic_write` of a text in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def json_text(values: object, indent: int | None = None) -> str:
    """JSON with readable names. Lone surrogates, which UTF-8 cannot encode, become JSON's \\u escapes."""
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def open_regular(path: Path | str, flags: int = os.O_RDONLY) -> int:
    """Open a file, as the `opener` of open(). Raises OSError for a pipe or device, which could block."""
    if not S_ISREG(Path(path).stat().st_mode):  # opening a device can have effects
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.open(path, flags | os.O_NONBLOCK)


def length_of(path: Path) -> int:
    """The bytes of a regular file, -1 if there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_size if S_ISREG(found.st_mode) else -1
    return -1


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrow_batch(path: Path, expected: "pa.Schema", mapped: int) -> "pa.RecordBatch":
    """The only record batch of an Arrow file with the expected schema, not yet validated.

    mapped: bytes from which the file is mapped into memory instead of read. Raises OSError, ArrowException,
    or ValueError for another schema or number of batches and for a compressed one: a few bytes could become
    gigabytes.
    """
    import pyarrow as pa

    source = None
    if path.stat().st_size >= mapped:
        with suppress(OSError):  # some network file systems cannot map files
            source = pa.memory_map(str(path))
    schema, rows = arrow_messages(source or pa.BufferReader(path.read_bytes()))
    if pa.ipc.read_schema(schema) != expected:
        raise ValueError("its columns are not those of a catalogue")
    return pa.ipc.read_record_batch(rows, expected)


def arrow_messages(source: "pa.NativeFile") -> "tuple[pa.Message, pa.Message]":
    """The schema and the only record batch of an Arrow file, which are no larger than the file."""
    import pyarrow as pa

    def field(table: int, number: int) -> int:
        """The place of a table's field in a flatbuffer; the table itself if it lacks the field."""
        fields = table - unpack_from("<i", meta, table)[0]
        at = 4 + 2 * number
        return table + (
            unpack_from("<H", meta, fields + at)[0] if at < unpack_from("<H", meta, fields)[0] else 0
        )

    source.seek(8)  # after the file's mark, it is a stream
    messages = [*pa.ipc.MessageReader.open_stream(source)]
    if [message.type for message in messages] != ["schema", "record batch"]:
        raise ValueError("it does not have exactly one record batch")
    meta = messages[1].metadata
    try:
        header = field(unpack_from("<I", meta)[0], 2)
        batch = header + unpack_from("<I", meta, header)[0]
        if field(batch, 3) != batch:
            raise ValueError("it is compressed")
    except StructError as error:
        raise ValueError("its record batch is damaged") from error
    return messages[0], messages[1]


def check_pickle(path: Path) -> None:
    """Raise UserError if reading a PyTorch file could take much more memory than the file has bytes."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        bomb = data.find(b"\nbytearray\n") >= 0  # a line of pickles that allocates any number of bytes
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch.save does not compress
            parts = archive.infolist()
        bomb |= any(part.compress_type for part in parts)
        bomb |= sum(part.file_size for part in parts) > path.stat().st_size  # they may overlap
    if bomb:
        raise UserError(f"{path} takes more memory than its size; save it again with torch.save")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut after this call cannot undo it.

    File systems that cannot flush on demand do it in their own time. Raises OSError when a flush fails.
    """
    # A folder that can be written to need not be readable, and some file systems do not open folders at all.
    closed = {errno.EACCES, errno.EISDIR} if path.is_dir() else set()
    with ignored(UNSUPPORTED | closed):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename, in place of an existing file. Raises UserError where the file system cannot rename."""
    try:
        old.replace(new)
    except OSError as error:
        if error.errno not in UNSUPPORTED - {errno.EPERM}:  # that is another user's file
            raise
        raise UserError(
            f"the file system of {new.parent} cannot rename files ({error.strerror}); choose a folder on "
            "another file system"
        ) from error


def lock(file: IO | int, folder: Path, risk: str, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file or folder until it is closed. Raises BlockingIOError when another process holds it.

    On a file system without locks this does nothing: one line on stderr names the `folder` and the `risk`.
    An empty `risk` means that the lock only saves work; then there is no line.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EACCES:  # what CIFS and some NFS servers answer instead of EAGAIN
            raise BlockingIOError(errno.EAGAIN, error.strerror) from error
        if error.errno not in NO_LOCKS:
            raise
        if risk:
            warn_once(f"the file system of {folder} does not support file locks ({error.strerror}): {risk}")


@cache
def warn_once(sentence: str) -> None:
    """Print a warning to stderr that this process has not printed before."""
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def ignored(numbers: frozenset[int]) -> Iterator[None]:
    """Ignore OSErrors with these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
