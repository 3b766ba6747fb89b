"""Read the samples of one source: repeat failed reads, try other files of the video."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from tools.images import TRANSIENT, BadImage, Packed

PAUSES = (0.2, 1.0, 5.0)  # seconds before a failed read is repeated

Part = Packed | BadImage  # a sample, or the reason why a part of a source is rejected
Read = Callable[[str], Iterator[Part]]  # the samples of a path below the source folder


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
