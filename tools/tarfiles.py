"""Write tars and read those of others, with webdataset's functions.

webdataset yields the bytes of members; random access needs their places. So `samples_in` reads the headers
with tarfile, and webdataset groups them. Nothing is unpacked, and names of members are never used as paths.
"""

import io
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.errors import UserError
from pipelines.files import open_regular
from tools.images import TRANSIENT, BadImage

BLOCK = tarfile.BLOCKSIZE
LONGEST_HEADER = 1 << 20  # bytes of a member's extended header; real ones have less than 100 kB
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
WORK = ".packing"  # folder next to a catalogue with what is done, until all tars are done
REPACKED = "repacked"  # folder next to a catalogue with further tars
FROM_HERE = "from here on the tar is "
BAD_START = "not a tar, or damaged at its start"
CUT_OFF = "cut off with the tar"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@contextmanager
def without_torch() -> Iterator[None]:
    """Import webdataset as on a machine without torch, whose import would take seconds in every worker."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyrefly: ignore
    try:
        yield
    finally:
        del sys.modules["torch"]


with without_torch():
    from webdataset.shardlists import expand_urls
    from webdataset.tariterators import base_plus_ext, group_by_keys
    from webdataset.writer import TarWriter


# ---- writing ---------------------------------------------------------------------------------------------


def tar_writer(file: BinaryIO) -> TarWriter:
    """A new tar whose members have a fixed time, owner and mode, so that its bytes depend on them alone."""
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)


def add_member(tar: TarWriter, key: str, suffix: str, data: bytes) -> int:
    """Append the file KEY.SUFFIX; return the byte offset of its content."""
    plain = key.isascii() and len(key) + len(suffix) < 100
    tar.tarstream.format = tarfile.USTAR_FORMAT if plain else tarfile.PAX_FORMAT  # the first is faster
    tar.write({"__key__": key, suffix: data})  # webdataset would sort the suffixes of a whole sample
    return tar.tarstream.offset - len(data) - -len(data) % BLOCK


# ---- reading ---------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a member's content is."""

    offset: int  # bytes from the start of the tar
    size: int  # bytes
    fault: str = ""  # why it cannot be read there


class Found(NamedTuple):
    """A sample of a tar; without files, a place from which on the tar cannot be read."""

    key: str  # as webdataset's __key__
    files: dict[str, Place]  # by suffix, in lower case with the dot
    fault: str = ""  # why the sample cannot be used


class ForeignTar(io.FileIO):
    """A tar that another program wrote. Absurd lengths in it take neither memory nor time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r", opener=open_regular)
        self.length = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        """The next part of a header."""
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""

    def content(self, place: Place, most: int) -> bytes:
        """A member's bytes. Raises `OSError`, or `BadImage` for a damaged one or one above `most` bytes."""
        if place.fault or place.size > most:
            raise BadImage(place.fault or f"a file of more than {most:,} bytes in the tar")
        return os.pread(self.fileno(), place.size, place.offset)

    def __getitem__(self, part: slice) -> np.ndarray:
        """uint8 [bytes]: a part of the tar, as of an array of its bytes. Raises `OSError`."""
        return np.frombuffer(os.pread(self.fileno(), part.stop - part.start, part.start), np.uint8)


def samples_in(tar: ForeignTar) -> Iterator[Found]:
    """The samples of a tar, grouped as webdataset groups them; at the end, why the tar ends early if it does.

    If it does, a last sample that lacks files of the sample before it is incomplete. Raises `OSError` if the
    storage fails.
    """
    before: Set[str] = {".cls", ".json", ".txt", ""}  # before the first one: it needs more than these
    ended: list[Found] = []
    twice: list[Exception] = []

    def note(error: Exception) -> bool:
        twice.append(error)
        return True

    def split(name: str) -> tuple[str | None, str | None]:
        key, suffix = base_plus_ext(name)
        return key, suffix and f".{suffix}"  # webdataset's own fields have no dot

    for sample in group_by_keys(_members(tar, ended), keys=split, handler=note):
        files = {name: place for name, place in sample.items() if name.startswith(".")}
        fault = CUT_OFF if ended and files.keys() < before else ""
        yield Found(sample["__key__"], files, "two files of one name" if twice else fault)
        before = files.keys()
        twice.clear()
    yield from ended


def _members(tar: ForeignTar, ended: list[Found]) -> Iterator[dict[str, Any]]:
    """The members that webdataset reads, and links, as it passes them on, with a `Place` as data.

    If the tar is damaged or cut off, that is added to `ended`.
    """
    at = 0
    try:
        archive = tarfile.TarFile(fileobj=tar, errors="surrogateescape")
        while (member := archive.next()) is not None:
            archive.members.clear()  # pyrefly: ignore  # millions would take gigabytes
            if archive.offset <= member.offset or member.size < 0:
                raise tarfile.ReadError("a negative length")
            at = archive.offset
            if member.isdir() or META.match(member.name):
                continue
            place = Place(member.offset_data, member.size, _fault(member, tar.length))
            yield {"fname": member.name, "data": place, "__url__": ""}
        last = tar[at : at + BLOCK]
        fault = "cut off" if len(last) < BLOCK else "damaged" if last.any() else ""
    except Exception as error:  # for hostile bytes, tarfile raises many types of error
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            raise
        fault = "damaged" if at < tar.length else "cut off"
    if fault:
        reason = f"{FROM_HERE}{fault}" if at else BAD_START
        ended.append(Found(f"byte {at}", {}, reason))


def _fault(member: tarfile.TarInfo, length: int) -> str:
    """Why a member's content is not in one piece in a tar of `length` bytes."""
    if not member.isreg():
        return "a link or a device in the tar"
    if member.issparse():
        return "a sparse file in the tar"
    return CUT_OFF if member.offset_data + member.size > length else ""


# ---- lists of tars ---------------------------------------------------------------------------------------


def expand(spec: str, flag: str) -> list[Path]:
    """The tars that `spec` names: braces and "::" as in webdataset, or * and ?. Raises `UserError`."""
    try:
        names = expand_urls(spec)
    except (AssertionError, ValueError) as error:
        raise UserError(f"{flag} {spec} cannot be expanded: {error}; check its braces.") from error
    paths: list[Path] = []
    for name in names:
        if re.match(r"[a-z0-9]+:", name):
            raise UserError(f"{flag} {name} is not a file; copy the tars to a disk first.")
        path = Path(name)
        top, pattern = Path(path.anchor), str(path.relative_to(path.anchor))
        if not {*"*?["} & {*name} or path.exists():
            paths.append(path)
        elif found := sorted(top.glob(pattern)) or sorted(top.glob(pattern.replace("[", "[[]"))):
            own = {WORK, REPACKED}
            tars = [path for path in found if path.suffix == ".tar" and not own & {*path.parts}] or found
            if others := sorted({*found} - {*tars}):
                print(f"{name}: {len(others)} other files are left out, such as {others[0]}")
            paths += tars
        else:
            raise UserError(f"{flag} {name} names no file; check the path.")
    for path in paths:
        check_tar(path, flag)
    return paths


def check_tar(path: Path, flag: str) -> None:
    """Raise `UserError` unless `path` is a regular file that is not compressed and has a name in UTF-8."""
    try:
        str(path.absolute()).encode()
        with ForeignTar(path) as tar:
            start = tar.read(8)
    except UnicodeEncodeError as error:
        raise UserError(f"{flag} {path!r} is not a name in UTF-8; rename it.") from error
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}; check the path.") from error
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{flag} {path} is compressed ({name}), so samples cannot be read at random; "
                "unpack it to a plain .tar."
            )
