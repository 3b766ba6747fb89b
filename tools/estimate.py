"""Estimates before packing starts: bytes, files and duration, compared with the free space.

Some sources, spread over the plan, are loaded as packing loads them. Their bytes and times are scaled to all
sources that are not packed yet.
"""

import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE

from rich.filesize import decimal

from pipelines.errors import UserError
from tools.images import BadImage
from tools.shards import Job, Sample, is_done, shuffled
from tools.sources import Part

LEAST = 200  # fewer sources are packed without an estimate
SAMPLES, SECONDS = 32, 10.0  # most sources that are loaded, and the time after which no further one is
FEWEST, PATIENCE = 16, 3  # for so few sources, the time may be so many times longer
PADDING = RECORDSIZE // 2  # bytes at the end of a tar, on average
LISTED = 80  # bytes per file of a sample in the index, the rows and the catalogue


@dataclass(frozen=True)
class Measured:
    """What loading some sources has shown; means per source, rejected ones included."""

    sources: int
    files: float  # bytes of the tar, the index and the rows
    seconds: float  # of one process
    rejected: Counter[str]  # sources by reason


def measure(jobs: Sequence[Job], samples: int = SAMPLES, seconds: float = SECONDS) -> Measured | None:
    """Load some sources of the jobs in a fixed random order, for `seconds`.

    If they are fewer than FEWEST by then, for up to PATIENCE times as long; None if not even one is loaded.
    """
    start = time.monotonic()
    sizes: list[int] = []
    times: list[float] = []
    rejected: Counter[str] = Counter()
    for job, sample in _spread(jobs, samples):
        end = start + seconds * (PATIENCE if len(sizes) < FEWEST else 1)
        begin, used, size = time.perf_counter(), time.process_time(), 0
        try:
            for _, part in job.read(sample):
                size += size_of(part, sample.key)
                if time.monotonic() > end:
                    break
        except BadImage as error:
            rejected[str(error)] += 1
        except OSError as error:
            rejected[f"cannot be read: {error.strerror}"] += 1
        if time.monotonic() > end:  # this source may be incomplete
            break
        sizes.append(size)
        # Waiting for the disk takes time, and a loader may use several cores, of which a process has one.
        times.append(max(time.perf_counter() - begin, time.process_time() - used))
    if not sizes:
        return None
    warm = times[1:] or times  # the first source pays for imports
    return Measured(len(sizes), sum(sizes) / len(sizes), sum(warm) / len(warm), rejected)


def _spread(jobs: Sequence[Job], count: int) -> Iterator[tuple[Job, Sample]]:
    """`count` samples, one from the middle of each of `count` equal parts of the jobs, in a random order."""
    ends = [*accumulate(len(job.samples) for job in jobs)]
    count = min(count, ends[-1])
    for part in shuffled(count).tolist():
        place = (2 * part + 1) * ends[-1] // (2 * count)
        job = jobs[number := bisect_right(ends, place)]
        yield job, job.samples[place - ends[number]]  # counted from the end


def size_of(part: Part, key: str) -> int:
    """Bytes that a packed sample adds to its shard: its frames, its label and its description."""
    if isinstance(part, BadImage):
        return LISTED
    contents = [len(frame) for frame in part.frames] + [1, BLOCKSIZE // 2]
    blocks = sum(BLOCKSIZE + size + -size % BLOCKSIZE for size in contents)
    return blocks + len(contents) * (LISTED + len(key))


def announce(jobs: Sequence[Job], part: tuple[int, int], out: Path, workers: int, ignore_space: bool) -> None:
    """Print what packing the jobs of part (i, n) will write, if they are not few; packed ones do not count.

    Raises UserError if all parts together do not fit on the disk of `out`, unless `ignore_space`.
    """
    missing, mine = (
        [job for job in some if not is_done(job)] for some in (jobs, jobs[part[0] - 1 :: part[1]])
    )
    every, count = (sum(len(job.samples) for job in some) for some in (missing, mine))
    if count < LEAST:
        return
    found = measure(mine)
    if found is None:
        print(f"no estimate: the first of {count} sources took longer than {PATIENCE * SECONDS:g} s")
        return
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, round(found.files * every) + PADDING * len(missing)
    size = decimal(round(found.files * count) + PADDING * len(mine))
    took = timedelta(seconds=round(found.seconds * count / workers))
    line = (
        f"estimate from {found.sources} of {count} sources: {size} in {len(mine)} tars, "
        f"{took} with {workers} process{'es' * (workers > 1)}; {decimal(free)} are free in {place}"
    )
    for reason, times in found.rejected.most_common(1):
        line += f"; {found.rejected.total()} of the {found.sources} are rejected, {times} as {reason!r}"
    print(line)
    if needed > free and not ignore_space:
        raise UserError(
            f"packing into {out} needs about {decimal(needed)} and {place} has {decimal(free)} free; choose "
            "another --out (OUT=), a smaller --short-side or --fps, or add --ignore-free-space."
        )
