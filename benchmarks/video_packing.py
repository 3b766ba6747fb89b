"""Compare the speed of packing videos with ffmpeg: python -m benchmarks video_packing --ffmpeg PATH

Ours is `tools.pack clips`: strict decoding, tar, index, catalogue, checksums, fsync. The other is an ffmpeg
process per video that writes JPEG files of the same side, rate and about the same size (-q:v 2). Both are
commands, timed with their start, and run on one core.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np
import tyro
from PIL import Image

from benchmarks.packing import cpu_of_children
from benchmarks.results import Race, Results, show
from pipelines.errors import UserError, run_cli
from tools.images import fitted

SIDE, FPS = 256, 30
SIZES = ((340, 256), (640, 360), (1280, 720))


def run(
    work: Path = Path("/tmp/hiera-train-bench"),
    ffmpeg: str = "ffmpeg",
    rounds: int = 3,
    seconds: int = 10,
    copies: int = 20,
) -> Results:
    """Both contenders extract the frames of the same H.264 videos in turn; a table per size of the videos.

    Args:
        work: folder for generated videos, which are kept and used again.
        ffmpeg: the program, or its path.
        rounds: rounds per contender.
        seconds: length of a video.
        copies: how often each video is packed per round; with few copies, the start dominates.
    """
    if shutil.which(ffmpeg) is None:
        raise UserError(f"there is no program {ffmpeg}; install ffmpeg, or give its path as --ffmpeg.")
    results: Results = {}
    for size in SIZES:
        source, out = work / f"videos-{size[0]}x{size[1]}-{seconds}s-{copies}", work / "videos-packed"
        if not source.exists():
            make_videos(source, size, seconds, copies)
        ways = {"ours": partial(pack, source, out), "ffmpeg": partial(extract, ffmpeg, source, out, size)}
        race: Race = {name: {"samples/s": [], "samples per CPU second": []} for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                shutil.rmtree(out, ignore_errors=True)
                start, used = time.perf_counter(), cpu_of_children()
                way()
                spent = (time.perf_counter() - start, cpu_of_children() - used)
                for values, taken in zip(race[name].values(), spent, strict=True):
                    values.append(copies * seconds * FPS / taken)
        shutil.rmtree(out)
        results[f"packing videos of {size[0]}x{size[1]}, one core; samples are frames"] = race
    return results


def make_videos(source: Path, size: tuple[int, int], seconds: int, copies: int) -> None:
    """Write `copies` links to one video of moving shapes with grain, and annotations that name them."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (size[1] // 16 + 20, size[0] // 16 + 20, 3), np.uint8)
    scene = np.asarray(
        Image.fromarray(coarse).resize((size[0] + 320, size[1] + 320), Image.Resampling.BICUBIC)
    )
    grain = random.normal(0, 6, (8, size[1], size[0], 1))
    unfinished = source.with_name(f"{source.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "annotations").mkdir(parents=True)
    with av.open(str(unfinished / "v0_0_10.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for n in range(FPS * seconds):
            x, y = 2 * n % 300, n % 300
            pixels = np.clip(scene[y : y + size[1], x : x + size[0]] + grain[n % 8], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    for n in range(1, copies):
        (unfinished / f"v{n}_0_10.mp4").hardlink_to(unfinished / "v0_0_10.mp4")
    lines = ["label,youtube_id,time_start,time_end", *(f"a,v{n},0,10" for n in range(copies)), ""]
    for split, rows in (("train", lines[:-2]), ("val", [lines[0], lines[-2]])):
        (unfinished / "annotations" / f"{split}.csv").write_text("\n".join([*rows, ""]))
    unfinished.rename(source)


def pack(source: Path, out: Path) -> None:
    """Pack the videos with our command."""
    words = ["--videos", source, "--annotations", source / "annotations", "--out", out, "--workers", "1"]
    on_one_core([sys.executable, "-m", "tools.pack", "clips", *map(str, words)])


def extract(ffmpeg: str, source: Path, out: Path, size: tuple[int, int]) -> None:
    """Extract the frames of each video with a process."""
    out.mkdir()
    scale = ":".join(map(str, fitted(size, SIDE)))
    for path in sorted(source.glob("*.mp4")):
        words = ["-v", "error", "-threads", "1", "-i", path, "-vf", f"fps={FPS},scale={scale}:flags=bicubic"]
        words += ["-q:v", "2", "-threads", "1", out / f"{path.stem}-%05d.jpg"]
        on_one_core([ffmpeg, *map(str, words)])


def on_one_core(command: Sequence[str]) -> None:
    """Run a command on the last core that this process may use."""
    core = max(os.sched_getaffinity(0))
    pin = partial(os.sched_setaffinity, 0, {core})
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=pin)


if __name__ == "__main__":
    run_cli(lambda: show(tyro.cli(run)))
