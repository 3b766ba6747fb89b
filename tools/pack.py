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

import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import av
import PIL
import tyro

from pipelines.errors import UserError, run_cli
from tools import folders
from tools.clips import load_clip, load_image
from tools.listing import plan_of
from tools.packing import PackOptions, run, source_folder
from tools.samples import list_samples
from tools.shards import ClipPacking, Packing, PackPlan, VideoPacking
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
Alias = tyro.conf.arg(aliases=["--val-labels"])
SPLITS = {"train": r"train(?:ing)?", "val": r"val(?:id|idation)?"}  # in the names of lists


@dataclass(frozen=True, kw_only=True)
class ListOptions(PackOptions):
    """Options of listing samples. Raises UserError for a value out of its range."""

    train_list: Path | None = None
    """file with a path and a class per line, instead of class folders; or SSv2's JSON; or Kinetics' CSV"""
    val_list: Annotated[Path | None, Alias] = None
    """the same for validation; without --train-list, the classes of a flat val folder: a picture's name and
    its class per line; or a class or a class number per line, in the order of the names"""


# ---- pictures --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageOptions(ListOptions):
    """Options of packing pictures. Raises UserError for a value out of its range."""

    shard_size: int = 1000
    """pictures per shard"""
    synsets: Path | None = None
    """for class numbers in --val-list: file with the class of each number per line, from 1 in the order of
    ILSVRC2012_ID"""

    def packing(self) -> Packing:
        """What decides the bytes of a shard."""
        return Packing(self.short_side, self.shard_size, self.max_pixels, self.val_fraction, PIL.__version__)


def plan_images(source: Path, options: ImageOptions) -> PackPlan:
    """List the pictures below `source`; decide split, label, key and order. Raises `UserError`."""
    lists = options.train_list, options.val_list, options.synsets
    listing = list_samples(source, folders.PICTURES, *lists)
    return plan_of("image", listing, options.val_fraction, options.packing(), str(source))


# ---- clips -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ListOptions):
    """Options of packing clips. Raises UserError for a value out of its range."""

    shard_size: int = 64
    """clips per shard"""
    fps: float | None = None
    """frames per second to store; by default 30, for folders of frames their own rate (--source-fps)"""
    source_fps: float = 30.0
    """frame rate of the folders of frames"""
    max_seconds: float = 60.0
    """longer clips are cut into equal parts"""
    clip_seconds: float = 10.0
    """approximate length of these parts"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("max-seconds", self.max_seconds), ("clip-seconds", self.clip_seconds)):
            if not 0 < value < float("inf"):
                raise UserError(f"--{name} is {value:g}; it must be above 0 and finite.")

    def packing(self, videos: bool) -> ClipPacking:
        """What decides the bytes of a shard. Raises `UserError` if folders have too few frames per second."""
        fps = self.fps or (30.0 if videos else self.source_fps)
        if not videos and fps > self.source_fps:
            raise UserError(
                f"--fps {fps:g} is more than the frames have, --source-fps {self.source_fps:g}; lower --fps, "
                "or give their true rate as --source-fps."
            )
        if fps * min(self.clip_seconds, self.max_seconds) < 1:
            raise UserError(
                f"--clip-seconds {self.clip_seconds:g} or --max-seconds {self.max_seconds:g} is shorter than "
                f"one frame at {fps:g} frames per second; raise it."
            )
        sizes = self.short_side, self.shard_size, self.max_pixels
        times = fps, self.max_seconds, self.clip_seconds, self.source_fps
        clips = ClipPacking(*sizes, 0.0, PIL.__version__, *times)
        return VideoPacking(**asdict(clips), av=av.__version__) if videos else clips


def plan_clips(root: Path, annotations: Path | None, options: ClipOptions, videos: bool) -> PackPlan:
    """List the clips below `root`; decide label, key and order of every clip. Raises `UserError`."""
    train, val = options.train_list, options.val_list
    if annotations is not None:
        train, val = train or find_list(annotations, "train"), val or find_list(annotations, "val")
    listing = list_samples(root, folders.VIDEOS if videos else folders.FRAMES, train, val, None)
    packing = options.packing(videos)
    if listing.val is None:
        packing = replace(packing, val_fraction=options.val_fraction)
    return plan_of("video", listing, options.val_fraction, packing, str(annotations or root))


def find_list(folder: Path, split: str) -> Path | None:
    """The list of a split in a folder: tiny_<split>.csv, or <split>.csv, or the only one with such a name.

    None if there is no list for validation. Raises `UserError`.
    """
    names = f"tiny_{split}.csv", f"{split}.csv"
    if found := [folder / name for name in names if (folder / name).is_file()]:
        return found[0]
    named = re.compile(
        rf"(?:.*[^a-z])?{SPLITS[split]}(?:_?list)?(?:[^a-z].*)?\.(?:csv|tsv|txt|json)", re.IGNORECASE
    )
    found = sorted(path for path in folder.iterdir() if named.fullmatch(path.name))
    if len(found) > 1:
        few = ", ".join(path.name for path in found[:3])
        raise UserError(f"{folder} contains several lists for {split}: {few}; name one with --{split}-list.")
    if not found and split == "train":
        raise UserError(
            f"{folder} contains neither {names[0]} nor {names[1]} nor another list for it; check "
            "--annotations."
        )
    return found[0] if found else None


# ---- commands -------------------------------------------------------------------------------------------

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
            Kinetics' annotations a clip is <youtube_id>_<start>_<end>. Or a folder with data_30fps_frames/.
        videos: instead of frames, folder with <class>/*.mp4, or train/<class>/*.mp4 and val/...; with
            Kinetics' annotations <youtube_id>_<start>_<end>.mp4 ... in folders of any depth.
    """
    if (root := frames or videos) is None or (frames and videos):
        raise UserError("clips come from one of --frames and --videos; give one of them.")
    if frames and (published := frames / "data_30fps_frames").is_dir():
        root = published
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
        frames: folder as for `tools.pack clips`; lists may be in its folder annotations/.
        videos: instead of frames, the same with videos.
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
        lists = clips / "annotations"
        lists = lists if lists.is_dir() and not listed else None
        codes.append(pack_clips(lists, out / "kinetics", ClipOptions(**asdict(options)), frames, videos))
    return max(codes)


if __name__ == "__main__":
    commands = {"images": pack_images, "clips": pack_clips, "tars": pack_tars, "all": pack_all}
    run_cli(lambda: sys.exit(tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)))
