"""Options and plans of packing: which pictures or clips there are, and in which order they are packed."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import av
import PIL
import tyro

from pipelines.errors import UserError
from tools.folders import FRAMES, PICTURES, VIDEOS
from tools.images import Packed, prepare, read_file
from tools.listing import plan_of
from tools.packing import PackOptions
from tools.samples import list_samples
from tools.shards import ClipPacking, Packing, PackPlan, VideoPacking

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


def load_image(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
    """Read and check one picture. Raises `BadImage` or `OSError`."""
    yield prepare(read_file(root / source), packing.short_side, packing.max_pixels)


def plan_images(source: Path, options: ImageOptions) -> PackPlan:
    """List the pictures below `source`; decide split, label, key and order. Raises `UserError`."""
    lists = options.train_list, options.val_list, options.synsets
    listing = list_samples(source, PICTURES, *lists)
    return plan_of("image", listing, options.val_fraction, options.packing(), str(source))


# ---- clips -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ListOptions):
    """Options of packing clips. Raises UserError for a value out of its range."""

    shard_size: int = 64
    """clips per shard"""
    fps: float | None = None
    """frames per second to store; by default 30, of folders of frames those that they have"""
    source_fps: float = 30.0
    """frames per second that folders of frames have"""
    max_seconds: float = 60.0
    """longer clips are cut into equal parts"""
    clip_seconds: float = 10.0
    """about the length of these parts"""

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
        sizes = self.short_side, self.shard_size, self.max_pixels
        times = fps, self.max_seconds, self.clip_seconds, self.source_fps
        clips = ClipPacking(*sizes, 0.0, PIL.__version__, *times)
        return VideoPacking(**asdict(clips), av=av.__version__) if videos else clips


def plan_clips(root: Path, annotations: Path | None, options: ClipOptions, videos: bool) -> PackPlan:
    """List the clips below `root`; decide label, key and order of every clip. Raises `UserError`."""
    train, val = options.train_list, options.val_list
    if annotations is not None:
        train, val = train or find_list(annotations, "train"), val or find_list(annotations, "val")
    listing = list_samples(root, VIDEOS if videos else FRAMES, train, val, None)
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
        raise UserError(f"{folder} holds several lists for {split}: {few}; name one with --{split}-list.")
    if not found and split == "train":
        raise UserError(
            f"{folder} holds neither {names[0]} nor {names[1]} nor another list for it; check --annotations."
        )
    return found[0] if found else None
