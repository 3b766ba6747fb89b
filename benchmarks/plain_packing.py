"""Pack as img2dataset resizes: python -m benchmarks.plain_packing FOLDER OUT --by opencv

Decode, resize, encode as JPEG, write into a tar, without checks and without resume. benchmarks/packing.py
compares our packing with it. It imports only what it needs.
"""

import multiprocessing
import tarfile
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import tyro
from PIL import Image

SIDE, QUALITY = 256, 90  # as in tools.pack


def by_opencv(data: bytes) -> bytes:
    import numpy as np

    cv2: Any = import_module("cv2")  # optional: without its types
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


def write_tar(by: str, files: list[Path], tar: Path) -> None:
    encode = {"opencv": by_opencv, "pillow": by_pillow}[by]
    with tarfile.open(tar, "w") as archive:
        for number, path in enumerate(files):
            data = encode(path.read_bytes())
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = len(data)
            archive.addfile(entry, BytesIO(data))


def main(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    by: Literal["opencv", "pillow"] = "pillow",
    workers: int = 2,
) -> None:
    """Pack all JPEGs below a folder.

    Args:
        source: the folder.
        out: new folder for one tar per worker.
        by: library that decodes, resizes and encodes.
        workers: processes.
    """
    out.mkdir()
    files = sorted(source.rglob("*.JPEG"))
    tasks = [(by, files[number::workers], out / f"{number}.tar") for number in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(write_tar, tasks)


if __name__ == "__main__":
    tyro.cli(main)
