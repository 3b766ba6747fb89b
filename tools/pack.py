"""Pack pictures and clips into shards.

    python -m tools.pack images --source data/imagenet --out shards/imagenet
    python -m tools.pack clips --frames data/tiny-kinetics-400/data_30fps_frames \\
        --annotations data/tiny-kinetics-400/annotations --out shards/tiny-kinetics-400
    python -m tools.pack clips --videos data/k400 --annotations data/k400/annotations --out shards/k400
    python -m tools.pack tars --train 'data/imagenet-train-{0000..1023}.tar'
    python -m tools.pack all --images data/imagenet --frames data/tiny-kinetics-400    (= make shards)

After an interruption, the same command continues. `python -m tools.pack images --help` lists the options.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.errors import UserError, run_cli
from tools.frames import load_clip
from tools.imagenet import ImageOptions, load_image, plan_images
from tools.kinetics import ClipOptions, plan_clips
from tools.packing import PackOptions, run, source_folder
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


def pack_images(source: Path, out: Path, options: Annotated[ImageOptions, Flat]) -> int:
    """Pack pictures into shards: ImageNet as published, class folders, or a flat folder.

    Args:
        source: folder with train/<class>/* and val/<class>/*, or <class>/*, or pictures without classes.
        out: folder to write, for example shards/imagenet.
        options: see `ImageOptions`.
    """
    source_folder(source, "--source", "the pictures")
    return run(plan_images(source, options), source, out, load_image, options)


def pack_clips(
    annotations: Path,
    out: Path,
    options: Annotated[ClipOptions, Flat],
    frames: Path | None = None,
    videos: Path | None = None,
) -> int:
    """Pack clips into shards, from folders of frames or from video files, with Kinetics' annotations.

    Args:
        annotations: folder with tiny_train.csv and tiny_val.csv, or train.csv and val.csv.
        out: folder to write, for example shards/tiny-kinetics-400.
        options: see `ClipOptions`.
        frames: folder with <label>/<youtube_id>_<start>_<end>/frame_00001.jpg ...
        videos: instead of frames, folder with <youtube_id>_<start>_<end>.mp4 ... in folders of any depth.
    """
    if (root := frames or videos) is None or (frames and videos):
        raise UserError("clips come from one of --frames and --videos; give one of them.")
    source_folder(root, *(("--videos", "the video files") if videos else ("--frames", "the label folders")))
    source_folder(annotations, "--annotations", "tiny_train.csv and tiny_val.csv")
    plan = plan_clips(root, annotations, options, videos is not None)
    return run(plan, root, out, load_video if videos else load_clip, options)


def pack_all(
    options: Annotated[PackOptions, Flat],
    images: Path = IMAGES,
    frames: Path = FRAMES,
    videos: Path | None = None,
    out: Path = Path("shards"),
) -> int:
    """Pack images and clips, whichever exist.

    Args:
        options: see `PackOptions`.
        images: folder as for `tools.pack images`.
        frames: folder with data_30fps_frames/ and annotations/.
        videos: instead of frames, folder with video files and annotations/.
        out: folder for both results, imagenet and kinetics.
    """
    if videos is not None and frames != FRAMES:
        raise UserError("clips come from one of FRAMES= and VIDEOS=; give one of them.")
    clips = videos or frames
    for path, default in ((images, IMAGES), (clips, FRAMES)):
        if path != default and not path.is_dir():
            raise UserError(f"{path} does not exist; check IMAGES=, FRAMES= and VIDEOS=")
    if not images.is_dir() and not clips.is_dir():
        raise UserError(HOW_TO_GET_DATA)
    codes, by_default = [], (images, clips) == (IMAGES, FRAMES)
    if images.is_dir():
        codes.append(pack_images(images, out / "imagenet", ImageOptions(**asdict(options))))
    elif by_default:
        print(f"{images} does not exist: no images packed")
    if clips.is_dir():
        source = {"videos": videos} if videos else {"frames": frames / "data_30fps_frames"}
        folders = (clips / "annotations", out / "kinetics")
        codes.append(pack_clips(*folders, ClipOptions(**asdict(options)), **source))
    elif by_default:
        print(f"{frames} does not exist: no clips packed")
    return max(codes)


if __name__ == "__main__":
    commands = {"images": pack_images, "clips": pack_clips, "tars": pack_tars, "all": pack_all}
    run_cli(lambda: sys.exit(tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)))
