"""Packs clips kept as folders of frames or as video files, with annotations as Kinetics publishes them.

    python -m tools.pack_kinetics --frames data/tiny-kinetics-400/data_30fps_frames \\
        --annotations data/tiny-kinetics-400/annotations --out shards/tiny-kinetics-400
    python -m tools.pack_kinetics --videos data/k400 --annotations data/k400/annotations --out shards/k400

A clip with bad frames keeps its longest run of good ones, a damaged video what comes before the damage, where
that is at least half the clip; otherwise it is rejected.
"""

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from stat import S_ISDIR

import tyro

from pipelines.errors import UserError, run_cli
from tools.images import COPIED, SUFFIXES, TRANSIENT, BadImage, Packed, mode_of, prepare, read_file
from tools.packing import HERE, Flags, crew_of, label_of, run, settings, source_folder
from tools.shards import Packing, Plan, samples_of
from tools.videos import best_file, clip_settings, find_videos, load_video, video_settings

COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True)
class Clip:
    """One line of an annotation file."""

    label: str
    video: str
    start: int  # seconds
    end: int

    def name(self) -> str:
        """The name of its folder of frames."""
        return f"{self.video}_{self.start:06d}_{self.end:06d}"


Place = Callable[[Clip, str], str]  # where a clip of a split should lie below the source folder


def pack_kinetics(
    frames: Path | None = None,
    annotations: Path = tyro.MISSING,
    out: Path = tyro.MISSING,
    workers: int | None = None,
    short_side: int = 256,
    shard_size: int = 64,
    max_pixels: int = 100_000_000,
    max_reject: float = 0.01,
    videos: Path | None = None,
    fps: float = 30.0,
    max_seconds: float = 60.0,
    spread: Flags = HERE,
) -> int:
    """Pack folders of frames or video files into shards; run it again after an interruption to go on.

    Args:
        frames: folder with <label>/<youtube_id>_<start>_<end>/frame_00001.jpg ...
        annotations: folder with tiny_train.csv and tiny_val.csv, or train.csv and val.csv.
        out: folder to write, for example shards/tiny-kinetics-400.
        workers: processes, one a core unless given; with Ray the shards under way.
        short_side: frames whose shorter side is larger are scaled down to this.
        shard_size: clips a shard.
        max_pixels: larger frames are rejected.
        max_reject: end with exit code 1 when more than this share is rejected.
        videos: instead of frames, folder with <youtube_id>_<start>_<end>.mp4 ... in folders of any depth.
        fps: frames per second: taken from videos; of folders of frames, the rate that they have.
        max_seconds: longer videos are rejected.
        spread: over what the shards are spread.
    """
    packing = settings(short_side, shard_size, max_pixels, 0.0, max_reject)
    crew = crew_of(workers, spread)
    if frames is not None and videos is None:
        packing = clip_settings(packing, fps)
        root = source_folder(frames, "--frames", "a folder for each label")
        place, load = partial(_frame_folder, root), load_clip
    elif videos is not None and frames is None:
        packing = video_settings(packing, fps, max_seconds)
        root = source_folder(videos, "--videos", "the video files")
        place, load = _video_place(root), partial(load_video, fps=fps, max_seconds=max_seconds)
    else:
        raise UserError("give the clips with either --frames or --videos, and with one of them only.")
    source_folder(annotations, "--annotations", "tiny_train.csv and tiny_val.csv")
    plan = plan_clips(root, annotations, packing, place)
    return run(plan, root, out, load, crew, max_reject)


def plan_clips(root: Path, annotations: Path, packing: Packing, place: Place) -> Plan:
    """Read the annotations and decide label, key and order of every clip. Raises `UserError`."""
    listed = {split: read_annotations(annotations, split) for split in ("train", "val")}
    classes = sorted({clip.label for clip in listed["train"]})
    labels = label_of(classes, [clip.label for clip in listed["val"]], str(annotations))
    splits = {
        split: samples_of(sorted((place(clip, split), clip.label, clip.name()) for clip in clips), labels)
        for split, clips in listed.items()
    }
    if not any((root / sample.source).exists() for samples in splits.values() for sample in samples):
        example = splits["train"][0].source
        raise UserError(f"none of the annotated videos is below {root}; {root / example} was expected.")
    return Plan("video", classes, splits, packing)


def read_annotations(folder: Path, split: str) -> list[Clip]:
    """The clips that tiny_<split>.csv, or else <split>.csv, names. Raises `UserError`."""
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


def _frame_folder(frames: Path, clip: Clip, split: str) -> str:
    """The clip's folder below `frames`: labels are published with underscores, some copies keep spaces."""
    underscored = f"{clip.label.replace(' ', '_')}/{clip.name()}"
    spaced = f"{clip.label}/{clip.name()}"
    return spaced if spaced != underscored and S_ISDIR(mode_of(frames / spaced)) else underscored


def _video_place(videos: Path) -> Place:
    """Finds a clip's file: below its label, its split or neither; copies differ in that, and in suffixes."""
    found = find_videos(videos)

    def place(clip: Clip, split: str) -> str:
        label = clip.label.replace(" ", "_")
        paths = found.get((clip.video, clip.start, clip.end), [f"{label}/{clip.name()}.mp4"])
        return best_file(paths, (split, clip.label, label))

    return place


def load_clip(root: Path, source: str, packing: Packing) -> Packed:
    """Read and check the frames of one clip. Raises `BadImage` or `OSError`."""
    folder = root / source
    if not S_ISDIR(mode_of(folder)):
        raise BadImage("no frame folder")
    listed = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    files = sorted((path for path in listed if not path.name.startswith(".")), key=_frame_number)
    if not files:
        raise BadImage("no frames in its folder")
    read = [_read(path, packing) for path in files]
    first, last = longest_run([isinstance(frame, Packed) for frame in read])
    if 2 * (last - first) < len(files):
        reasons = Counter(str(frame) for frame in read if isinstance(frame, BadImage))
        raise BadImage(f"under half of its frames in a row are good: {reasons.most_common(1)[0][0]}")
    pictures = _one_size(
        files[first:last], [frame for frame in read[first:last] if isinstance(frame, Packed)], packing
    )
    changes = {picture.change for picture in pictures} - {COPIED}
    notes = ["bad frames cut off"] if last - first < len(files) else []
    if _frame_number(files[last - 1])[0] - _frame_number(files[first])[0] >= last - first:
        notes.append("gaps in its frame numbers closed")
    change = "; ".join([*notes, *sorted(changes)]) or COPIED
    return Packed([picture.frames[0] for picture in pictures], pictures[0].size, change)


def _read(path: Path, packing: Packing) -> Packed | BadImage:
    try:
        return prepare(read_file(path), packing.short_side, packing.max_pixels)
    except BadImage as error:
        return error
    except OSError as error:
        if error.errno in TRANSIENT:  # the frame may be good: the clip must not lose it
            raise
        return BadImage(f"cannot be read: {error.strerror}")


def _frame_number(path: Path) -> tuple[int, str]:
    """Frames follow the last number of their names, zero-padded or not."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1, path.name


def longest_run(good: Sequence[bool]) -> tuple[int, int]:
    """The first longest run of True in `good`, as (start, end past it)."""
    runs = [list(run) for value, run in groupby(range(len(good)), key=good.__getitem__) if value]
    longest = max(runs, key=len, default=[])
    return (longest[0], longest[-1] + 1) if longest else (0, 0)


def _one_size(files: Sequence[Path], pictures: Sequence[Packed], packing: Packing) -> list[Packed]:
    """Bring frames that differ to the size most of the clip has."""
    goal = Counter(picture.size for picture in pictures).most_common(1)[0][0]
    limits = (packing.short_side, packing.max_pixels, goal)
    return [
        picture if picture.size == goal else prepare(read_file(path), *limits)
        for path, picture in zip(files, pictures, strict=True)
    ]


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(pack_kinetics)))
