"""List clips, kept as folders of frames or as video files, with annotations as Kinetics publishes them."""

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from stat import S_ISDIR

import av
import PIL

from pipelines.errors import UserError
from tools.images import mode_of
from tools.packing import PackOptions, label_of
from tools.shards import ClipPacking, PackPlan, VideoPacking, samples_of
from tools.videos import best_file, find_videos

COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True, kw_only=True)
class ClipOptions(PackOptions):
    """Options of packing clips. Raises UserError for a value out of its range."""

    shard_size: int = 64
    """clips per shard"""
    fps: float = 30.0
    """videos: frames per second to extract; folders of frames: the rate that they already have"""
    max_seconds: float = 60.0
    """longer videos are rejected"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fps <= 1000:
            raise UserError(f"--fps is {self.fps:g}; it must be above 0 and at most 1000.")
        if not 0 < self.max_seconds < float("inf"):
            raise UserError(f"--max-seconds is {self.max_seconds:g}; it must be above 0 and finite.")

    def packing(self, videos: bool) -> ClipPacking:
        """What decides the bytes of a shard."""
        sizes = self.short_side, self.shard_size, self.max_pixels
        clips = ClipPacking(*sizes, val_fraction=0.0, pillow=PIL.__version__, fps=self.fps)
        if not videos:
            return clips
        return VideoPacking(**asdict(clips), max_seconds=self.max_seconds, av=av.__version__)


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


def plan_clips(root: Path, annotations: Path, options: ClipOptions, videos: bool) -> PackPlan:
    """Read the annotations; decide label, key and order of every clip. Raises `UserError`."""
    source_of = video_finder(root) if videos else partial(frame_folder, root)
    listed = {split: read_annotations(annotations, split) for split in ("train", "val")}
    classes = sorted({clip.label for clip in listed["train"]})
    labels = label_of(classes, [clip.label for clip in listed["val"]], str(annotations))
    splits = {
        split: samples_of(sorted((source_of(clip, split), clip.label, clip.name()) for clip in clips), labels)
        for split, clips in listed.items()
    }
    if not any((root / sample.source).exists() for samples in splits.values() for sample in samples):
        example = root / splits["train"][0].source
        raise UserError(f"{root} has none of the annotated clips, such as {example}; check the folder.")
    return PackPlan("video", classes, splits, options.packing(videos))


def read_annotations(folder: Path, split: str) -> list[Clip]:
    """The clips in tiny_<split>.csv, or otherwise in <split>.csv. Raises `UserError`."""
    paths = [folder / f"tiny_{split}.csv", folder / f"{split}.csv"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds neither {paths[0].name} nor {paths[1].name}; check --annotations.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(f"{path} has no column {missing[0]!r}; its first line must name {COLUMNS}.")
            clips = [_clip(row, f"{path} line {reader.line_num}") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV text file in UTF-8: {error}.") from error
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
    if not clip.label or not clip.video or "/" in clip.label + clip.video:
        raise UserError(f"{where}: label {label!r} or youtube_id {video!r} cannot name a folder.")
    return clip


def frame_folder(frames: Path, clip: Clip, split: str) -> str:
    """The clip's folder below `frames`. Labels are published with underscores; some copies have spaces."""
    underscored = f"{clip.label.replace(' ', '_')}/{clip.name()}"
    spaced = f"{clip.label}/{clip.name()}"
    return spaced if spaced != underscored and S_ISDIR(mode_of(frames / spaced)) else underscored


def video_finder(videos: Path) -> Callable[[Clip, str], str]:
    """A function from a clip and its split to the clip's file below `videos`.

    Copies of Kinetics differ in folders (by label, by split or none) and in suffixes.
    """
    found = find_videos(videos)

    def find(clip: Clip, split: str) -> str:
        label = clip.label.replace(" ", "_")
        paths = found.get((clip.video, clip.start, clip.end), [f"{label}/{clip.name()}.mp4"])
        return best_file(paths, (split, clip.label, label))

    return find
