"""Compare the speed of packing with img2dataset's way of resizing: python -m benchmarks packing

Ours is `tools.pack images`: strict decoding, checks, tar, index, catalogue, checksums, fsync. The other is
benchmarks/plain_packing.py with Pillow, or with OpenCV if it is installed. Both are commands, timed with
their start, with the same side and quality.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import tyro

from benchmarks.loader import data_in
from benchmarks.results import Race, Results, show
from pipelines.errors import run_cli
from pipelines.machine import usable_cores

PR_SET_CHILD_SUBREAPER = 36  # Linux: this process becomes the parent of processes that their parent leaves


def run(
    work: Path = Path("/tmp/hiera-train-bench"),
    images: Path = Path("data/imagenet"),
    workers: int = 2,
    rounds: int = 5,
    copies: int = 8,
) -> Results:
    """All contenders pack the same 500-pixel pictures in turn; their start is included.

    Args:
        work: the data of `benchmarks.loader`, made from `images` if it is missing.
        images: folder of JPEG pictures, searched through.
        workers: processes.
        rounds: rounds per contender.
        copies: how often each picture is packed per round; with few copies, the start dominates.
    """
    source = linked(data_in(work, images) / "originals", work / "originals-linked", copies)
    count = sum(1 for _ in source.rglob("*.JPEG"))
    plain = ["benchmarks.plain_packing", str(source), "{out}", "--by"]
    ways = {
        "ours": ["tools.pack", "images", "--source", str(source), "--out", "{out}", "--shard-size", "128"],
        "Pillow, tar": [*plain, "pillow"],
    }
    if find_spec("cv2"):
        ways["OpenCV, tar (as img2dataset)"] = [*plain, "opencv"]
    print(f"processor: {processor()}, {usable_cores()} cores", file=sys.stderr)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    race: Race = {name: {"samples/s": [], "samples per CPU second": []} for name in ways}
    out = work / "packed-again"
    for _ in range(rounds):
        for name, words in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            command = [
                sys.executable,
                "-m",
                *(word.format(out=out) for word in words),
                "--workers",
                str(workers),
            ]
            start, used = time.perf_counter(), cpu_of_children()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            adopt_and_wait()
            spent = (seconds, cpu_of_children() - used)
            for values, seconds in zip(race[name].values(), spent, strict=True):
                values.append(count / seconds)
    shutil.rmtree(out)
    shutil.rmtree(source)
    return {f"packing pictures, {workers} processes": race}


def linked(source: Path, to: Path, copies: int) -> Path:
    """The folder `to`, with several hard links to every picture of class folders."""
    shutil.rmtree(to, ignore_errors=True)
    for path in source.rglob("*.JPEG"):
        folder = to / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            (folder / f"{path.stem}-{copy}.JPEG").hardlink_to(path)
    return to


def adopt_and_wait() -> None:
    """Wait for the processes that a command has left, such as its fork server, so that their time counts."""
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return


def processor() -> str:
    """The CPU's name, and the numbers that tell its generation: the name may be that of a whole series."""
    text = Path("/proc/cpuinfo").read_text()
    family, model, name = (
        (re.findall(rf"^{key}\s*: (.*)", text, re.M) or ["unknown"])[0]
        for key in ("cpu family", "model", "model name")
    )
    return f"{name} (family {family}, model {model})"


def cpu_of_children() -> float:
    """CPU time of this process and of its finished child processes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    run_cli(lambda: show(tyro.cli(run)))
