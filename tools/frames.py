"""Read a clip that is kept as a folder of frames.

If some frames are bad, the longest run of good frames is kept. If that is less than half of the clip, the
clip is rejected.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from stat import S_ISDIR

from tools.images import COPIED, SUFFIXES, TRANSIENT, BadImage, Packed, mode_of, prepare, read_file
from tools.shards import Packing


def load_clip(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
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
    yield Packed([picture.frames[0] for picture in pictures], pictures[0].size, change)


def _read(path: Path, packing: Packing) -> Packed | BadImage:
    try:
        return prepare(read_file(path), packing.short_side, packing.max_pixels)
    except BadImage as error:
        return error
    except OSError as error:
        if error.errno in TRANSIENT:  # the frame may be good, so it is read again
            raise
        return BadImage(f"cannot be read: {error.strerror}")


def _frame_number(path: Path) -> tuple[int, str]:
    """Sort key of frames: the last number in the name, zero-padded or not."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1, path.name


def longest_run(good: Sequence[bool]) -> tuple[int, int]:
    """The first longest run of True in `good`, as (start, end past it)."""
    runs = [list(run) for value, run in groupby(range(len(good)), key=good.__getitem__) if value]
    longest = max(runs, key=len, default=[])
    return (longest[0], longest[-1] + 1) if longest else (0, 0)


def _one_size(files: Sequence[Path], pictures: Sequence[Packed], packing: Packing) -> list[Packed]:
    """Resize frames of other sizes to the clip's most frequent size."""
    goal = Counter(picture.size for picture in pictures).most_common(1)[0][0]
    limits = (packing.short_side, packing.max_pixels, goal)
    return [
        picture if picture.size == goal else prepare(read_file(path), *limits)
        for path, picture in zip(files, pictures, strict=True)
    ]
