"""The authors' released weights by name, such as `mae_hiera_base_16x224:mae_k400`, fetched once.

They lie in torch's hub cache, each beside a .sha256 that remembers its checksum from the first download.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from models.errors import ModelError

URL = "https://dl.fbaipublicfiles.com/hiera"
LICENCE = "weights by Meta Platforms under CC BY-NC 4.0: not for commercial use"
IMAGE_SIZES = ("tiny", "small", "base", "base_plus", "large", "huge")
VIDEO_SIZES = ("base", "base_plus", "large", "huge")
ATTEMPTS = 4


def names() -> list[str]:
    """Every official name, `MODEL:CHECKPOINT`; a classifier's includes its finetuning."""
    image = [f"hiera_{size}_224" for size in IMAGE_SIZES]
    video = [f"hiera_{size}_16x224" for size in VIDEO_SIZES]
    return [
        *(f"{name}:mae_in1k_ft_in1k" for name in image),
        *(f"{name}:mae_k400_ft_k400" for name in video),
        *(f"mae_{name}:mae_in1k" for name in image),
        *(f"mae_{name}:mae_k400" for name in video),
    ]


def is_name(source: str) -> bool:
    """Whether `source` is written like an official name rather than a path."""
    return source.startswith(("hiera_", "mae_hiera_")) and ":" in source


def path_of(source: str) -> Path:
    """The file that a path or an official name stands for, fetched if it must be.

    Raises ModelError where there is no such file and its name is nearly an official one.
    """
    if is_name(source):
        return fetch(source)
    path = Path(source)
    if not path.exists():
        for name in names():
            if name.split(":")[0] == path.name.removesuffix(".pth"):
                raise ModelError(f"no weights file at {path}; the authors' own are called {name}")
    return path


def fetch(name: str, url: str | None = None, wait: float = 2.0) -> Path:
    """Give the local file of an official name, downloading it on first use; prints the licence.

    wait: seconds before the first retry, doubled for each further one.
    Raises ModelError for an unknown name, a failed download or a file that has changed since.
    """
    if name not in names():
        raise ModelError(f"no official weights are called {name!r}; known: {', '.join(names())}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name.split(':')[0]}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        _lock(folder, path.parent)  # of a run's processes the first downloads, the others wait
        if not path.is_file():
            _download(f"{url or URL}/{path.name}", path, wait)
    finally:
        os.close(folder)
    remembered = path.with_suffix(".pth.sha256")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not remembered.is_file():
        part = _part(remembered)
        part.write_text(found + "\n")
        part.replace(remembered)
    elif remembered.read_text().strip() != found:
        raise ModelError(
            f"{path} has changed since its download; delete it and {remembered.name}, then retry"
        )
    print(f"{name}: {LICENCE}")
    return path


def _lock(descriptor: int, folder: Path) -> None:
    """Wait for the lock on an open folder; where there are no locks, warn and continue without.

    Without it several processes may download the same file, but each renames a whole one into place. Network
    file systems without locks give ENOLCK, ENOSYS, ENOTSUP or EINVAL; NFS with locks gives EBADF for folders.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        print(
            f"warning: {folder} cannot be locked ({error.strerror}); "
            "processes that start together may download the same file more than once"
        )


def _part(path: Path) -> Path:
    """A temporary name in the same folder, different for every process of every machine."""
    return path.with_suffix(f".part-{socket.gethostname()}-{os.getpid()}")


def _download(url: str, path: Path, wait: float) -> None:
    """Download with retries to a temporary file, then rename."""
    for attempt in range(ATTEMPTS):
        try:
            return _receive(url, path)
        except OSError as error:
            reason = error
            if isinstance(error, urllib.error.HTTPError) and error.code in (403, 404):
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait * 2**attempt)
    raise ModelError(f"cannot download {url} ({reason}); fetch it elsewhere and put it at {path}")


def _receive(url: str, path: Path) -> None:
    from rich.console import Console
    from rich.progress import wrap_file

    part = _part(path)
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, part.open("wb") as file:
            size = int(reply.headers.get("Content-Length") or 0)
            with wrap_file(reply, size, description=path.name, console=Console(stderr=True)) as source:
                shutil.copyfileobj(source, file)
            if size and file.tell() != size:
                raise OSError(f"the connection broke after {file.tell()} of {size} bytes")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
