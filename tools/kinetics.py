"""Pack clips, kept as folders of frames or as video files: options, and the plan from folders or lists.

Kinetics' annotations name a clip by its video and its seconds, from which its file's name is made.
"""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from stat import S_ISDIR

import av
import PIL

from pipelines.errors import UserError
from tools.folders import FRAMES, VIDEOS
from tools.images import mode_of
from tools.listing import Listed, Listing, plan_of
from tools.lists import read_text
from tools.samples import ListOptions, list_samples, names_of
from tools.shards import ClipPacking, PackPlan, VideoPacking
from tools.videos import find_videos, ranked_files

COLUMNS = ("label", "youtube_id", "time_start", "time_end")
SPLITS = {"train": r"train(?:ing)?", "val": r"val(?:id|idation)?"}  # in the names of lists


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
        for name, value in (("fps", self.fps), ("source-fps", self.source_fps)):
            if value is not None and not 0 < value <= 1000:
                raise UserError(f"--{name} is {value:g}; it must be above 0 and at most 1000.")
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


@dataclass(frozen=True)
class Clip:
    """One line of an annotation file."""

    label: str
    video: str
    start: int  # seconds
    end: int

    def name(self) -> str:
        """Name of its folder of frames."""
        return f"{self.video}_{self.start:06d}_{self.end:06d}"


FilesOf = Callable[[Clip, str], Sequence[str]]  # the files of a clip of a split below the root, best first


def plan_clips(root: Path, annotations: Path | None, options: ClipOptions, videos: bool) -> PackPlan:
    """List the clips below `root`; decide label, key and order of every clip. Raises `UserError`."""
    lists = {"train": options.train_list, "val": options.val_list}
    if annotations is not None:
        lists = {split: path or find_list(annotations, split) for split, path in lists.items()}
    train, val = lists["train"], lists["val"]
    if train is not None and is_kinetics(train):
        listing = _listing(root, train, val, video_finder(root) if videos else partial(frame_folder, root))
    else:
        listing = list_samples(root, VIDEOS if videos else FRAMES, train, val, None)
    packing = options.packing(videos)
    if listing.val is None:
        packing = replace(packing, val_fraction=options.val_fraction)
    return plan_of("video", listing, options.val_fraction, packing, str(annotations or root))


def _listing(root: Path, train: Path, val: Path | None, files_of: FilesOf) -> Listing:
    """The clips of one or two annotation files."""
    listed: dict[str, list[Listed]] = {}
    for split, path in (("train", train), ("val", val)):
        for clip in read_annotations(path) if path is not None else ():
            source, *others = files_of(clip, split)
            item = Listed(source, clip.label, clip.name(), clip.video, tuple(others))
            listed.setdefault(split, []).append(item)
    every = [item for items in listed.values() for item in items]
    if not any((root / item.source).exists() for item in every):
        example = root / min(item.source for item in every)
        raise UserError(f"{root} has none of the annotated clips, such as {example}; check the folder.")
    return Listing(listed["train"], listed.get("val"), where=names_of(train, val))


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


def is_kinetics(path: Path) -> bool:
    """True if a list has the columns of Kinetics."""
    return "youtube_id" in read_text(path, "the list").lstrip().partition("\n")[0].split(",")


def read_annotations(path: Path) -> list[Clip]:
    """The clips of an annotation file. Raises `UserError`."""
    reader = csv.DictReader(io.StringIO(read_text(path, "the list"), newline=""))
    try:
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path} has no column {missing[0]!r}; its first line must name {COLUMNS}.")
        clips = [_clip(row, f"{path} line {reader.line_num}") for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}; correct it.") from error
    if not clips:
        raise UserError(f"{path} names no clips.")
    return clips


def _clip(row: dict[str, str | None], where: str) -> Clip:
    label, video, start, end = (row[name] or "" for name in COLUMNS)
    try:
        clip = Clip(label.strip(), video.strip(), int(float(start)), int(float(end)))
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: time_start and time_end must be seconds, not {start!r} {end!r}."
        ) from error
    if {clip.label, clip.video} & {"", ".", ".."} or "/" in clip.label + clip.video:
        raise UserError(f"{where}: label {label!r} or youtube_id {video!r} cannot name a folder.")
    return clip


def frame_folder(frames: Path, clip: Clip, split: str) -> Sequence[str]:
    """The clip's folder below `frames`. Labels are published with underscores; some copies have spaces."""
    underscored = f"{clip.label.replace(' ', '_')}/{clip.name()}"
    spaced = f"{clip.label}/{clip.name()}"
    return [spaced if spaced != underscored and S_ISDIR(mode_of(frames / spaced)) else underscored]


def video_finder(videos: Path) -> FilesOf:
    """A function from a clip and its split to the clip's files below `videos`, the best first.

    Copies of Kinetics differ in folders (by label, by split or none) and in suffixes.
    """
    found = find_videos(videos)

    def find(clip: Clip, split: str) -> Sequence[str]:
        label = clip.label.replace(" ", "_")
        paths = found.get((clip.video, clip.start, clip.end), [f"{label}/{clip.name()}.mp4"])
        return ranked_files(paths, (split, clip.label, label))

    return find
