"""Read the samples of a WebDataset tar that another program wrote.

A sample's picture is KEY.jpg, .jpeg, .png or .webp; a clip is KEY.f0000.jpg, KEY.f0001.jpg ... Its class is
the number or name in KEY.cls, else in "label" or "class" of KEY.json, else the number in KEY.txt, or a name
there that --class-names lists; other text in KEY.txt, and what KEY.json calls the caption, is not used. With
--class-key NAME, it is in KEY.NAME, else in NAME of KEY.json. The name of a number in
.cls, label or class is in "class_name" of KEY.json.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.errors import UserError
from tools.images import COPIED, CUT, BadImage, Packed, fitted, prepare
from tools.shards import Packing, readable
from tools.sources import Part
from tools.tarfiles import ForeignTar, Place, samples_in

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
READ = (".cls", ".json", ".txt")
USUAL_KEYS = ("", "cls", "label", "class")  # of classes whose name is in class_name
FRAME = re.compile(r"\.f(\d{4,9})\.jpg", re.ASCII)
NUMBER = re.compile(r"\d{1,6}", re.ASCII)
SHOWN = 10  # suffixes and fields in a message
LABEL_BYTES, PICTURE_BYTES = 1 << 20, 1 << 30
IN_PLACE, MADE = "in place", "repacked: "
NO_PICTURE = "no .jpg, .jpeg, .png, .webp or .f0000.jpg after the first dot of its name"
ANY_SIZE = 65_535  # pixels; no JPEG has a longer side


@dataclass(frozen=True)
class TarPacking(Packing):
    """What decides the catalogue of foreign tars, besides the tars."""

    fps: float  # frames per second of clips
    clips: bool  # frames of clips, not pictures
    repack: bool
    unlabelled: bool
    class_names: str  # one per line
    class_key: str  # where the class is, "" for the usual places


def load_tar(root: Path, source: str, packing: Packing) -> Iterator[Part]:
    """Read and check every sample of a tar. Raises `OSError`."""
    assert isinstance(packing, TarPacking)
    names = frozenset(packing.class_names.splitlines())
    with ForeignTar(root / source) as tar:
        for found in samples_in(tar):
            key = readable(found.key)
            row: dict[str, object] = {"key": key, "source": readable(f"{source}/{found.key}")}
            try:
                if found.fault:
                    raise BadImage(found.fault)
                if not packing.unlabelled:
                    row["label"], row["class_name"] = label_in(tar, found.files, names, packing.class_key)
                packed = read_sample(tar, found.files, packing)
                yield replace(packed, row=row | packed.row)
            except BadImage as error:
                yield BadImage(str(error), row=row)


def frames_of(files: Mapping[str, Place]) -> list[str]:
    """The suffixes of a sample's frames in order, or of its picture."""
    clip = sorted((int(match[1]), name) for name in files if (match := FRAME.fullmatch(name)))
    return [name for _, name in clip] or [name for name in PICTURES if name in files][:1]


def is_clip(names: Sequence[str]) -> bool:
    """True for the suffixes of a clip's frames."""
    return bool(FRAME.fullmatch(names[0]))


def read_sample(tar: ForeignTar, files: Mapping[str, Place], packing: TarPacking) -> Packed:
    """A sample; if its bytes can be used in the tar, `row` has the offset of each of its frames.

    Raises `OSError`, or `BadImage` if it is damaged, of the other kind, or needs --repack.
    """
    names = frames_of(files)
    if not names:
        raise BadImage(NO_PICTURE)
    if is_clip(names) != packing.clips:
        raise BadImage("a picture among clips" if packing.clips else "a clip among pictures")
    contents = [tar.content(files[name], PICTURE_BYTES) for name in names]
    pictures = [prepare(data, ANY_SIZE, packing.max_pixels) for data in contents]
    changes = {picture.change for picture in pictures} - {COPIED, CUT}
    if len({picture.size for picture in pictures}) > 1:
        changes.add("frames of different sizes")
    reason = ", ".join(sorted(changes))
    if not changes:
        offsets: dict[str, object] = {"offsets": [files[name].offset for name in names]}
        return Packed([picture.frames[0] for picture in pictures], pictures[0].size, IN_PLACE, row=offsets)
    if not packing.repack:
        raise BadImage(f"{reason}: needs --repack")
    size = fitted(pictures[0].size, packing.short_side)
    made = [prepare(data, packing.short_side, packing.max_pixels, size) for data in contents]
    return Packed([picture.frames[0] for picture in made], size, f"{MADE}{reason}")


def label_in(tar: ForeignTar, files: Mapping[str, Place], names: frozenset[str], key: str) -> tuple[int, str]:
    """The class of a sample: its number, -1 if there is none, and its name, "" if there is none.

    names, key: --class-names and --class-key. Raises `OSError` or `BadImage`.
    """
    own = f".{key.lower()}"
    texts = {
        name: tar.content(files[name], LABEL_BYTES).decode("utf-8-sig", "replace").strip()
        for name in ((own, ".json") if key else READ)
        if name in files
    }
    described = described_by(texts.get(".json", ""))
    name = described.get("class_name") if key in USUAL_KEYS else ""
    name = name if isinstance(name, str) else ""
    if (first := own if key else ".cls") in texts:
        return class_of(texts[first], name)
    for field in (key,) if key else ("label", "class"):
        value = described.get(field)
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(value, int | str) and not isinstance(value, bool):
            return class_of(str(value), name)
    text = texts.get(".txt", "")
    if text == str(described.get("caption", "")).strip():  # some captions are numbers
        return -1, readable(name)
    return class_of(text, name) if NUMBER.fullmatch(text) or text in names else (-1, name)


def described_by(text: str) -> dict[str, object]:
    """The fields of a .json; none if it is damaged."""
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}


def class_of(text: str, name: str) -> tuple[int, str]:
    """(number, name) of a class written as `text`, a number, -1 for none, or a name. Raises `BadImage`."""
    if NUMBER.fullmatch(text):
        return int(text), readable(name)
    if text in ("", "-1"):
        return -1, readable(name)
    if re.fullmatch(r"[+-]?[\d.]+", text):
        raise BadImage("a class that is not a number from 0 to 999,999")
    return -1, readable(text)


def not_read(path: Path) -> str:
    """What a tar has besides what is read: suffixes with their numbers, and the fields of its first .json.

    Raises `OSError`.
    """
    counts: Counter[str] = Counter()
    fields: list[str] = []
    with ForeignTar(path) as tar, suppress(BadImage):
        for found in samples_in(tar):
            counts.update({*found.files} - {*PICTURES, *READ, *filter(FRAME.fullmatch, found.files)})
            if not fields and ".json" in found.files:
                text = tar.content(found.files[".json"], LABEL_BYTES).decode("utf-8-sig", "replace")
                fields = [f"field {name} of .json" for name in described_by(text)]
    others = [f"{name} ({count})" for name, count in counts.most_common(SHOWN)]
    return readable(", ".join([*others, *fields[:SHOWN]]))


def first_is_clip(tars: Sequence[Path]) -> bool:
    """True if the first sample with pictures is a clip. Raises `UserError` if there is none."""
    for path in tars:
        with ForeignTar(path) as tar:
            for found in samples_in(tar):
                if names := frames_of(found.files):
                    return is_clip(names)
    raise UserError(
        f"no tar such as {tars[0]} contains KEY{' or KEY'.join(PICTURES)}; check --train, and that no key "
        "has a dot, as in a.v1.jpg: WebDataset ends a key at its first dot."
    )
