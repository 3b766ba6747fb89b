"""Measure how large packed datasets become: python -m benchmarks.sizes --images DIR (docs/data.md)

The datasets themselves are not needed. Their pictures and videos are imitated with the photographs below DIR:

- Photographs larger than `--side` pixels are packed at this short side, so that they are scaled down as those
  of ImageNet are. Their bytes per pixel are scaled to 341 x 256 pixels.
- Videos (H.264, CRF 23) are windows that move over mosaics of the photographs at their own scale: 340 x 256
  pixels, 10 s at 30 frames per second as in Kinetics-400; 426 x 240 pixels, 4 s at 12 frames per second as in
  SSv2.

All are packed by `tools.pack`. `python -m benchmarks loader` measures how fast they load.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipelines.dataset import open_dataset
from pipelines.errors import UserError, run_cli
from tools.pack import ClipOptions, ImageOptions, pack_clips, pack_images

IMAGENET, KINETICS, SSV2 = 1_281_167, 240_000, 169_000  # training samples
NORMAL = 341 * 256  # pixels of a picture of ImageNet at short side 256
VIDEOS = {
    "K400": ((340, 256), 30, 300, KINETICS),
    "SSv2": ((427, 240), 12, 48, SSV2),
}  # size, fps, frames, clips


def run(images: Path, work: Path = Path("/tmp/hiera-train-sizes"), count: int = 16, side: int = 192) -> None:
    """Print the table.

    Args:
        images: folder of JPEG photographs, searched through.
        work: folder for generated data, which must not exist.
        count: videos per dataset.
        side: short side at which the photographs are packed; smaller than theirs.
    """
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if len(found) < 640:
        raise UserError(
            f"{images} contains {len(found)} JPEG pictures, fewer than 640; give another --images"
        )
    chosen = random.Random(0).sample(found, 640)
    table = Table("data", "bytes per sample", "per frame", "total", "catalogue")
    add_pictures(table, chosen, work, side)
    for name, (size, fps, frames, clips) in VIDEOS.items():
        make_videos(chosen, work / name, count, size, fps, frames)
        for rate in (30.0, 15.0, 7.5):
            out = work / f"{name}-{rate:g}"
            options = ClipOptions(workers=2, fps=rate, shard_size=4)
            pack_clips(work / name / "annotations", out, options, videos=work / name)
            add(table, f"{name}, {rate:g} fps", out, clips)
    Console().print(table)


def add_pictures(table: Table, chosen: list[Path], work: Path, side: int) -> None:
    """Pack the pictures at short side `side`; scale their bytes to the usual size of a picture."""
    for path in chosen:
        link = work / "pictures" / "a" / f"{path.parent.name}-{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    options = ImageOptions(workers=2, short_side=side, val_fraction=0)
    pack_images(work / "pictures", work / "packed", options)
    dataset = open_dataset(work / "packed", "train")
    pixels = (dataset.width.astype(np.int64) * dataset.height).sum()
    scale = NORMAL / (pixels / len(dataset))
    add(table, f"ImageNet, short side 256 (from {side})", work / "packed", IMAGENET, scale)


def add(table: Table, name: str, out: Path, samples: int, scale: float = 1.0) -> None:
    """Add a row about a packed dataset, its frames' bytes multiplied by `scale`."""
    dataset = open_dataset(out, "train")
    frames = int(dataset.size.sum())
    others = sum(dataset.info.tar_bytes["train"]) - frames
    each = (scale * frames + others) / len(dataset)
    catalogue = dataset.catalogue.stat().st_size / len(dataset)
    per_frame = f"{scale * dataset.size.mean() / 1e3:.1f} kB"
    total = f"{each * samples / 1e9:.0f} GB"
    table.add_row(name, f"{each / 1e3:.0f} kB", per_frame, total, f"{catalogue * samples / 1e6:.0f} MB")


def make_videos(
    chosen: list[Path], out: Path, count: int, size: tuple[int, int], fps: int, frames: int
) -> None:
    """Write `count` videos in Kinetics' layout; the first is also the validation split."""
    lines = ["label,youtube_id,time_start,time_end"]
    (out / "annotations").mkdir(parents=True)
    for number in range(count):
        lines.append(f"a,video{number},0,10")
        path = out / f"video{number}_000000_000010.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "23"})
            stream.width, stream.height, stream.pix_fmt = size[0] & ~1, size[1], "yuv420p"
            for picture in moving(chosen, number, (stream.width, stream.height), frames):
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
    for split, rows in (("train", lines), ("val", lines[:2])):
        (out / "annotations" / f"{split}.csv").write_text("\n".join([*rows, ""]))


def moving(chosen: list[Path], number: int, size: tuple[int, int], frames: int) -> Iterator[Image.Image]:
    """Windows of `size` that move over a mosaic of photographs at their own scale."""
    rng = random.Random(number)
    pictures = [Image.open(path).convert("RGB") for path in rng.sample(chosen, 12)]
    side = pictures[0].width
    mosaic = Image.new("RGB", (4 * side, 3 * side))
    for at, picture in enumerate(pictures):
        mosaic.paste(picture.resize((side, side)), (at % 4 * side, at // 4 * side))
    ways = [
        (rng.uniform(0, mosaic.width - size[0]), rng.uniform(0, mosaic.height - size[1])) for _ in range(2)
    ]
    for frame in range(frames):
        share = frame / frames
        left, top = (round(a + share * (b - a)) for a, b in zip(*ways, strict=True))
        yield mosaic.crop((left, top, left + size[0], top + size[1]))


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(run, description=__doc__))
