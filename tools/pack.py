"""Packs whatever is there: `make shards` = python -m tools.pack --images DIR --frames DIR.

Images become shards/imagenet, clips shards/kinetics; what does not exist is left out.
"""

import sys
from pathlib import Path

import tyro

from pipelines.errors import UserError, run_cli
from tools.pack_imagenet import pack_imagenet
from tools.pack_kinetics import pack_kinetics
from tools.packing import HERE, Flags

IMAGES, FRAMES = Path("data/imagenet"), Path("data/tiny-kinetics-400")
WHERE = f"""nothing to pack. Put data in place, then run make shards again:
  images  ImageNet-1K from image-net.org (train and val class folders) into {IMAGES}/
  clips   Tiny-Kinetics-400 from github.com/Tramac/tiny-kinetics-400 (annotations/, data_30fps_frames/)
          into {FRAMES}/
  or name your own folders: make shards IMAGES=DIR FRAMES=DIR, or VIDEOS=DIR for clips kept as video files
  or see everything work on drawn data: make demo"""


def pack(
    images: Path = IMAGES,
    frames: Path = FRAMES,
    out: Path = Path("shards"),
    workers: int | None = None,
    short_side: int = 256,
    videos: Path | None = None,
    spread: Flags = HERE,
) -> int:
    """Pack images and clips, those of the two that exist.

    Args:
        images: folder for tools.pack_imagenet.
        frames: folder that holds data_30fps_frames/ and annotations/, for tools.pack_kinetics.
        out: folder for both results, imagenet and kinetics.
        workers: processes, one a core unless given; with Ray the shards under way.
        short_side: larger pictures and frames are scaled down to this.
        videos: instead of frames, folder that holds video files and annotations/, for tools.pack_kinetics.
        spread: over what the shards are spread.
    """
    if videos is not None and frames != FRAMES:
        raise UserError("give the clips with either FRAMES= or VIDEOS=, and with one of them only.")
    clips = videos or frames
    for path, default in ((images, IMAGES), (clips, FRAMES)):
        if path != default and not path.is_dir():
            raise UserError(f"{path} does not exist; check IMAGES=, FRAMES= and VIDEOS=")
    if not images.is_dir() and not clips.is_dir():
        raise UserError(WHERE)
    codes, by_default = [], (images, clips) == (IMAGES, FRAMES)
    if images.is_dir():
        codes.append(pack_imagenet(images, out / "imagenet", workers, short_side, spread=spread))
    elif by_default:
        print(f"{images} does not exist: no images packed")
    if clips.is_dir():
        source = None if videos else frames / "data_30fps_frames"
        folders = (source, clips / "annotations", out / "kinetics")
        codes.append(pack_kinetics(*folders, workers, short_side, videos=videos, spread=spread))
    elif by_default:
        print(f"{frames} does not exist: no clips packed")
    return max(codes)


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(pack)))
