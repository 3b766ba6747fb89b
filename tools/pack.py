"""Pack pictures and clips into shards.

    python -m tools.pack images --source data/imagenet --out shards/imagenet
    python -m tools.pack clips --frames data/tiny-kinetics-400/data_30fps_frames \\
        --annotations data/tiny-kinetics-400/annotations --out shards/tiny-kinetics-400
    python -m tools.pack clips --videos data/k400 --annotations data/k400/annotations --out shards/k400
    python -m tools.pack clips --videos data/UCF-101 --out shards/ucf101
    python -m tools.pack clips --videos data/ssv2 --annotations data/ssv2-labels --out shards/ssv2
    python -m tools.pack tars --train 'data/imagenet-train-{0000..1023}.tar'
    python -m tools.pack all --images data/imagenet --frames data/tiny-kinetics-400    (= make shards)

Larger pictures and frames are scaled down to a short side of 256 pixels and encoded as JPEGs of quality 90;
correct JPEGs that are not larger are copied byte for byte. With --short-side 100000 all correct JPEGs are.
After an interruption, the same command continues. `python -m tools.pack images --help` lists the options.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.errors import UserError, run_cli
from tools.clips import load_clip
from tools.imagenet import ImageOptions, load_image, plan_images
from tools.kinetics import ClipOptions, plan_clips
from tools.packing import run, source_folder
from tools.samples import ListOptions
from tools.tars import pack_tars
from tools.videos import load_video

IMAGES, FRAMES = Path("data/imagenet"), Path("data/tiny-kinetics-400")
HOW_TO_GET_DATA = f"""nothing to pack. Put data in place, then run make shards again:
  images  ImageNet-1K from image-net.org (train and val class folders) into {IMAGES}/
  clips   Tiny-Kinetics-400 from github.com/Tramac/tiny-kinetics-400 (annotations/, data_30fps_frames/)
          into {FRAMES}/
  or give your own folders: make shards IMAGES=DIR FRAMES=DIR, or VIDEOS=DIR for clips in video files
  or try everything on generated data: make demo"""

Flat = tyro.conf.arg(name="")  # the options of a dataclass without a prefix
CLIPS = ClipOptions()


def pack_images(source: Path, out: Path, options: Annotated[ImageOptions, Flat]) -> int:
    """Pack pictures into shards: ImageNet as published, class folders, lists, or a flat folder.

    Args:
        source: folder with train/<class>/* and val/<class>/*, or <class>/*, or pictures without classes; with
            --train-list, the folder to which its paths are relative.
        out: folder to write, for example shards/imagenet.
        options: see `ImageOptions`.
    """
    source_folder(source, "--source", "the pictures")
    return run(plan_images(source, options), source, out, load_image, options)


def pack_clips(
    annotations: Path | None = None,
    out: Path = tyro.MISSING,
    options: Annotated[ClipOptions, Flat] = CLIPS,
    frames: Path | None = None,
    videos: Path | None = None,
) -> int:
    """Pack clips into shards, from folders of frames or from video files.

    Args:
        annotations: folder with tiny_train.csv and tiny_val.csv, or train.csv and val.csv, as Kinetics
            publishes them, or with other lists of train and val; without any list, folders decide.
        out: folder to write, for example shards/tiny-kinetics-400.
        options: see `ClipOptions`.
        frames: folder with <class>/<clip>/frame_00001.jpg ..., or train/<class>/<clip>/... and val/...; with
            Kinetics' annotations a clip is <youtube_id>_<start>_<end>.
        videos: instead of frames, folder with <class>/*.mp4, or train/<class>/*.mp4 and val/...; with
            Kinetics' annotations <youtube_id>_<start>_<end>.mp4 ... in folders of any depth.
    """
    if (root := frames or videos) is None or (frames and videos):
        raise UserError("clips come from one of --frames and --videos; give one of them.")
    if frames and (inner := frames / "data_30fps_frames").is_dir():
        raise UserError(f"--frames {frames} holds {inner.name}; give --frames {inner}.")
    source_folder(root, *(("--videos", "the video files") if videos else ("--frames", "the label folders")))
    if annotations is not None:
        source_folder(annotations, "--annotations", "the lists for train and val")
    plan = plan_clips(root, annotations, options, videos is not None)
    return run(plan, root, out, load_video if videos else load_clip, options)


def pack_all(
    options: Annotated[ListOptions, Flat],
    images: Path | None = None,
    frames: Path | None = None,
    videos: Path | None = None,
    out: Path = Path("shards"),
) -> int:
    """Pack the given folders; if none is given, data/imagenet and data/tiny-kinetics-400, whichever exist.

    Args:
        options: see `ListOptions` and `PackOptions`.
        images: folder as for `tools.pack images`.
        frames: folder as for `tools.pack clips`, or with data_30fps_frames/ and annotations/.
        videos: instead of frames, folder as for `tools.pack clips`; lists may be in its folder annotations/.
        out: folder for both results, imagenet and kinetics.
    """
    if videos and frames:
        raise UserError("clips come from one of FRAMES= and VIDEOS=; give one of them.")
    for path in (images, frames, videos):
        if path and not path.is_dir():
            raise UserError(f"{path} does not exist; check IMAGES=, FRAMES= and VIDEOS=")
    listed = options.train_list is not None or options.val_list is not None
    if listed and bool(images) == bool(frames or videos):
        raise UserError("a list is for one folder; name it, either with IMAGES= or with FRAMES= or VIDEOS=.")
    if not (images or frames or videos):
        if not IMAGES.is_dir() and not FRAMES.is_dir():
            raise UserError(HOW_TO_GET_DATA)
        for path in (IMAGES, FRAMES):
            if not path.is_dir():
                print(f"{path} does not exist: it is not packed")
        images, frames = (path if path.is_dir() else None for path in (IMAGES, FRAMES))
    codes = []
    if images:
        codes.append(pack_images(images, out / "imagenet", ImageOptions(**asdict(options))))
    if clips := videos or frames:
        published, annotations = clips / "data_30fps_frames", clips / "annotations"
        source = {"videos": clips} if videos else {"frames": published if published.is_dir() else clips}
        lists = annotations if annotations.is_dir() and not listed else None
        codes.append(pack_clips(lists, out / "kinetics", ClipOptions(**asdict(options)), **source))
    return max(codes)


if __name__ == "__main__":
    commands = {"images": pack_images, "clips": pack_clips, "tars": pack_tars, "all": pack_all}
    run_cli(lambda: sys.exit(tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)))
