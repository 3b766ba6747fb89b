"""Times packing beside img2dataset's way of resizing: python -m tools.bench packing

Ours is tools.pack_imagenet: strict decoding, checks, tar, index, catalogue, checksums, fsync. The other takes
each file as img2dataset does, OpenCV (where it is installed) or Pillow: decode, resize by area, encode as a
JPEG of the same quality, write into a tar; nothing is checked and nothing can be resumed.
"""

import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import tyro
from PIL import Image

from benchmarks.loader import data_in
from benchmarks.results import Race, Results, show
from pipelines.errors import run_cli
from tools.images import QUALITY
from tools.pack_imagenet import pack_imagenet

SIDE = 256
Encode = Callable[[bytes], bytes]


def by_opencv(data: bytes) -> bytes:
    import cv2  # pyrefly: ignore
    import numpy as np

    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    scale = SIDE / min(picture.shape[:2])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def by_pillow(data: bytes) -> bytes:
    picture = Image.open(BytesIO(data)).convert("RGB")
    scale = SIDE / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    out = BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def write_tar(encode: Encode, files: list[Path], tar: Path) -> None:
    with tarfile.open(tar, "w") as archive:
        for number, path in enumerate(files):
            data = encode(path.read_bytes())
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = len(data)
            archive.addfile(entry, BytesIO(data))


def plain(encode: Encode, files: list[Path], out: Path, workers: int) -> None:
    """A tar for every worker."""
    out.mkdir()
    tasks = [(encode, files[number::workers], out / f"{number}.tar") for number in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(write_tar, tasks)


def run(
    work: Path = Path("/tmp/hiera-train-bench"),
    images: Path = Path("data/imagenet"),
    workers: int = 2,
    rounds: int = 5,
) -> Results:
    """Let every contender pack the same 500-pixel pictures in turn, start-up included.

    Args:
        work: the data of `tools.bench loader`, made from `images` where it is missing.
        images: folder of JPEG pictures, searched through.
        workers: processes.
        rounds: how often each packs.
    """
    source = data_in(work, images) / "originals"
    files = sorted(source.rglob("*.JPEG"))
    ways: dict[str, Callable[[Path], object]] = {
        "ours": lambda out: pack_imagenet(source, out, workers, SIDE, 128),
        "Pillow, tar": lambda out: plain(by_pillow, files, out, workers),
    }
    if find_spec("cv2"):
        ways["OpenCV, tar (as img2dataset)"] = lambda out: plain(by_opencv, files, out, workers)
    race: Race = {name: {"samples/s": [], "samples per CPU second": []} for name in ways}
    for _ in range(rounds):
        for name, pack in ways.items():
            out = work / "packed-again"
            shutil.rmtree(out, ignore_errors=True)
            start, used = time.perf_counter(), cpu_of_children()
            pack(out)
            spent = (time.perf_counter() - start, cpu_of_children() - used)
            for values, seconds in zip(race[name].values(), spent, strict=True):
                values.append(len(files) / seconds)
            shutil.rmtree(out)
    return {f"packing {len(files)} pictures, {workers} processes": race}


def cpu_of_children() -> float:
    """CPU time of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    run_cli(lambda: show(tyro.cli(run)))
