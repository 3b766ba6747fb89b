"""What the process is, and what this machine lets it use."""

import ctypes
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # takes seconds, and packing can do without


READ = 4  # batches that are read before the decoder takes them
MOST_THREADS = 12  # for a GPU, unless more are set: it decodes the greater part itself


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, and the device it computes on."""

    rank: int
    size: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def usable_cores(root: Path = Path("/")) -> int:
    """CPU cores this process may use: its affinity, or the container's CPU quota when that is less.

    A quota of 1.5 cores counts as 1, one below 1 as 1. root: where /proc and /sys are.
    """
    return max(1, min(len(os.sched_getaffinity(0)), *map(int, cpu_quotas(root))))


def load_own_nvjpeg() -> None:
    """Load the nvJPEG of the environment: DALI decodes with the first one loaded.

    torchvision brings an older one of the same name, and LD_LIBRARY_PATH may lead to another.
    """
    for path in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/lib/libnvjpeg.so.*"):
        ctypes.CDLL(str(path))


def libraries(name: str, maps: str | None = None) -> list[Path]:
    """The files that this process has loaded of a library, such as libnvjpeg.so, in any version.

    maps: the text of /proc/self/maps.
    """
    maps = Path("/proc/self/maps").read_text() if maps is None else maps
    pattern = re.compile(rf"\s(/.*/{re.escape(name)}[^/\n]*)$", re.MULTILINE)
    return [Path(path) for path in dict.fromkeys(pattern.findall(maps))]


def cpu_quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's cgroups and all cgroups around them, versions 1 and 2."""
    yield float(1 << 30)  # no quota
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inner = Path(path.lstrip("/"))
        for folder in (top / inner, *(top / outer for outer in inner.parents)):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            texts = [(folder / name).read_text() for name in names if (folder / name).is_file()]
            numbers = " ".join(texts).split()  # quota and period, microseconds; "max" or -1: no quota
            if len(numbers) == 2 and numbers[0].isdecimal() and int(numbers[0]) > 0:
                yield int(numbers[0]) / int(numbers[1])


@dataclass(frozen=True)
class Sizing:
    """Thread count and prefetch depth."""

    threads: int
    prefetch: int  # batches that are decoded ahead
    reason: str


def sizing(device: "torch.device", threads: int = 0) -> Sizing:
    """Decoding threads and prefetch depth of this process, with the reason; 0 threads: from the machine."""
    cores, processes = usable_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = max(1, cores // processes)
    if device.type == "cuda" and share > 2:
        share -= 1  # for the thread that feeds the GPU
    why = f"{cores} cores, {processes} processes"
    if device.type == "cuda" and share > MOST_THREADS:
        share, why = MOST_THREADS, f"{why}, at most {MOST_THREADS} for a GPU: each one takes GPU memory"
    chosen, ahead = threads or share, 2 if device.type == "cuda" else 4
    why = "as set" if threads else why
    reason = f"{chosen} decoding threads ({why}), {ahead} batches decoded and {READ} more read ahead"
    return Sizing(chosen, ahead, reason)


def message(device: "torch.device", threads: int = 0) -> list[str]:
    """The loader's threads, in lines to print; for a GPU also the library that decodes."""
    line = f"loader: {sizing(device, threads).reason}"
    if device.type != "cuda":
        return [line]
    found = libraries("libnvjpeg.so")
    if not found:
        return [line, "nvJPEG is not loaded: the CPU decodes every picture; install the environment again"]
    return [f"{line}, decoded by {', '.join(map(str, found))}"]
