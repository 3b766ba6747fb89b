"""List clips, kept as folders of frames or as video files, with annotations as Kinetics publishes them."""

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from stat import S_ISDIR

import av
import PIL

from pipelines.errors import UserError
from tools.images import mode_of
from tools.packing import PackOptions, label_of
from tools.shards import ClipPacking, PackPlan, VideoPacking, samples_of
from tools.videos import find_videos, ranked_files

COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True, kw_only=True)
class ClipOptions(PackOptions):
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


def plan_clips(root: Path, annotations: Path, options: ClipOptions, videos: bool) -> PackPlan:
    """Read the annotations; decide label, key and order of every clip. Raises `UserError`."""
    files_of = video_finder(root) if videos else partial(frame_folder, root)
    listed = {split: read_annotations(annotations, split) for split in ("train", "val")}
    classes = sorted({clip.label for clip in listed["train"]})
    labels = label_of(classes, [clip.label for clip in listed["val"]], str(annotations))
    splits = {}
    for split, clips in listed.items():
        files = [(files_of(clip, split), clip.label, clip.name()) for clip in clips]
        others = {paths[0]: tuple(paths[1:]) for paths, *_ in files}
        samples = samples_of(sorted((paths[0], label, name) for paths, label, name in files), labels)
        splits[split] = [replace(sample, others=others[sample.source]) for sample in samples]
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


def frame_folder(frames: Path, clip: Clip, split: str) -> list[str]:
    """The clip's folder below `frames`. Labels are published with underscores; some copies have spaces."""
    underscored = f"{clip.label.replace(' ', '_')}/{clip.name()}"
    spaced = f"{clip.label}/{clip.name()}"
    return [spaced if spaced != underscored and S_ISDIR(mode_of(frames / spaced)) else underscored]


def video_finder(videos: Path) -> Callable[[Clip, str], list[str]]:
    """A function from a clip and its split to the clip's files below `videos`, the best first.

    Copies of Kinetics differ in folders (by label, by split or none) and in suffixes.
    """
    found = find_videos(videos)

    def find(clip: Clip, split: str) -> list[str]:
        label = clip.label.replace(" ", "_")
        paths = found.get((clip.video, clip.start, clip.end), [f"{label}/{clip.name()}.mp4"])
        return ranked_files(paths, (split, clip.label, label))

    return find
