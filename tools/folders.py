"""List the pictures, videos or frame folders below a folder, with the classes and splits of its layout.

A layout is <split>/<class>/..., <class>/..., or samples without classes. A frame folder is a folder of
pictures. Only the paths decide; no file is opened. Layouts with two meanings raise `UserError`.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from posixpath import commonpath

from pipelines.errors import UserError
from tools import videos
from tools.images import SUFFIXES
from tools.listing import Listed, Listing, has_classes
from tools.shards import readable

SPLIT = re.compile(r"(?:(train)(?:ing)?|(val)(?:id|idation)?|(test)(?:ing)?)(?:\.x\d*)?", re.IGNORECASE)
PART = re.compile(r".*\.x\d*", re.IGNORECASE)  # train.X1, train.X2, ... together are one split
SOURCE_VIDEO = re.compile(  # names of clips that begin with the name of the video from which they were cut
    r"(v_.+_g\d+)_c\d+"  # UCF101
    r"|(.+)_[fulh]_(?:nm|cm)_np\d+_(?:fr|ba|le|ri)_(?:goo|med|bad)_\d+"  # HMDB51
    r"|([\w-]{11})_\d+_\d+",  # Kinetics
    re.ASCII,
)
NO_SAMPLES = "folders without samples"
TWINS = "other files of the same video"


@dataclass(frozen=True)
class Kind:
    """What a sample is."""

    what: str
    suffixes: frozenset[str]
    folders: bool = False  # a sample is a folder of files with these suffixes


PICTURES = Kind("pictures", SUFFIXES)
FRAMES = Kind("folders of pictures", SUFFIXES, folders=True)
VIDEOS = Kind("videos", videos.SUFFIXES)
IGNORED = frozenset({"@eaDir", "#recycle", "__MACOSX", "lost+found"})  # folders that systems add
SYSTEM_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
MEDIA = PICTURES.suffixes | VIDEOS.suffixes


@dataclass(frozen=True)
class Found:
    """The sources below a folder, sorted by bytes, and what is no source."""

    root: Path
    kind: Kind
    sources: Sequence[str]
    empty: Sequence[str]  # the topmost folders without sources
    left_out: dict[str, tuple[int, str]]


def find_sources(root: Path, kind: Kind) -> Found:
    """Every source below `root`. Raises `UserError`."""
    sources: list[str] = []
    folders: list[str] = []
    others: dict[str, tuple[int, str]] = {}
    for folder, files in walk_folders(root):
        below = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        folders.append(below[:-1])
        good = [name for name in files if _suffix(name) in kind.suffixes and not is_hidden(name)]
        sources += [below + name for name in good] if not kind.folders else [below[:-1]] * bool(good)
        for name in files if len(good) < len(files) else ():
            if is_hidden(name):
                _count(others, f"{name if name in SYSTEM_FILES else 'hidden'} files", below + name)
            elif (suffix := _suffix(name)) not in kind.suffixes:
                _count(others, f"{suffix or 'other'} files", below + name)
    used: set[str] = set()
    for path in sources:
        while path and path not in used:
            used.add(path)
            path = path.rpartition("/")[0]
    empty = [path for path in folders if path not in used and path.rpartition("/")[0] in {"", *used}]
    return Found(root, kind, sorted(sources, key=os.fsencode), [path for path in empty if path], others)


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 and len(name) - dot <= 10 else ""


def _count(counts: dict[str, tuple[int, str]], what: str, example: str) -> None:
    count, first = counts.get(what, (0, example))
    counts[what] = (count + 1, min(first, example))


def walk(top: Path) -> Iterator[Path]:
    """Every file of `walk_folders` that is not hidden."""
    return (folder / name for folder, files in walk_folders(top) for name in files if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """True for the name of a file that is hidden, or that a system adds."""
    return name.startswith(".") or name in SYSTEM_FILES


def walk_folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `top` on with the names of its files; links are followed. Raises `UserError`.

    Hidden folders are left out, and those that systems add.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be listed: {error.strerror}; check its permissions."
        ) from error

    for folder, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        here = Path(folder)
        if any(here.samefile(parent) for parent in here.parents if parent.is_relative_to(top)):
            folders.clear()  # a link back to a folder above would never end
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in IGNORED]
        yield here, files


# ---- layouts -----------------------------------------------------------------------------------------------


def by_folder(found: Found) -> Listing:
    """The classes and splits that the folders show. Raises `UserError`."""
    root, sources = found.root, found.sources
    if not sources:
        raise UserError(
            f"{root} contains no {found.kind.what} ({' '.join(sorted(found.kind.suffixes))}); check "
            "the folder."
        )
    _reject_nested(found)
    below = _descend(sources)
    if below:
        print(f"{root} contains only {below[:-1]}: its folders are used")
    where, left_out = root / below, dict(found.left_out)
    for path in found.empty:
        _count(left_out, NO_SAMPLES, path)
    inside: dict[str, list[str]] = {}
    for source in sources:
        inside.setdefault(_head(source, below), []).append(source)
    folders = _folders_of_splits(where, inside, [path for path in found.empty if path.startswith(below)])
    if not folders:
        if found.kind.folders and len(sources) > 1 and not sources[0]:
            raise _mixed(root)
        return Listing(_labelled(found, sources, below, left_out), None, left_out)
    listed: dict[str, list[Listed]] = {"train": [], "val": [], "test": []}
    for split, names in folders.items():
        for name in names:
            listed[split] += _labelled(found, inside[name], f"{below}{name}/", left_out)
    if not listed["val"] and listed["test"]:
        if has_classes(listed["test"]) == has_classes(listed["train"]):
            print(f"{where} has no val folder: {folders['test'][0]} becomes the validation split")
            listed["val"] = listed.pop("test")
        else:
            print(f"{where} has no val folder, and {folders['test'][0]} has no classes: it is not used")
    kept = {path for split in ("train", "val") for item in listed[split] for path in item.paths}
    for source in sources if len(kept) < len(sources) else ():
        if source not in kept:
            head = _head(source, below)
            _count(left_out, f"{found.kind.what} in {head}" if head else f"loose {found.kind.what}", source)
    return Listing(listed["train"], listed["val"] or None, left_out)


def _reject_nested(found: Found) -> None:
    """Frame folders may not contain others, except `root` itself, which may contain split folders."""
    folders = {*found.sources} if found.kind.folders else set()
    for source in found.sources if folders else ():
        for outer in accumulate(source.split("/")[:-1], "{}/{}".format):
            if outer in folders:
                raise _mixed(found.root / outer)


def _mixed(folder: Path) -> UserError:
    return UserError(
        f"{folder} contains both pictures and folders of pictures; a clip is one folder of pictures, so move "
        "one of the two elsewhere."
    )


def _descend(sources: Sequence[str]) -> str:
    """The folders above a dataset that is some folders too deep, each with a slash."""
    folders = {source.rpartition("/")[0] for source in sources}
    common = commonpath(folders)
    above = common.rpartition("/")[0] if common in folders else common  # the last folder may be a class
    return "".join(
        f"{name}/" for name in takewhile(lambda name: name and not split_of(name), above.split("/"))
    )


def split_of(name: str) -> str:
    """train, val or test, if a folder's name means that; otherwise ""."""
    found = SPLIT.fullmatch(name)
    return next((group.lower() for group in found.groups() if group), "") if found else ""


def _head(source: str, below: str) -> str:
    """The first folder of a path below `below`; "" for a loose file."""
    return source[len(below) :].rpartition("/")[0].partition("/")[0]


def _folders_of_splits(where: Path, heads: Iterable[str], empty: Sequence[str]) -> dict[str, list[str]]:
    """The folders of each split; {} if they are classes. heads: folders with samples, "" for loose ones."""
    folders: dict[str, list[str]] = {}
    for name in sorted(heads):
        folders.setdefault(split_of(name), []).append(name)
    others = folders.pop("", [])
    for path in empty:
        if folders and split_of(name := path.rpartition("/")[2]) and (where / name).is_dir():
            raise UserError(f"{where / name} contains no samples; fill the folder or remove it.")
    for split, names in folders.items():
        if len(names) > 1 and not all(map(PART.fullmatch, names)):
            raise UserError(f"{where} has several {split} folders, {' and '.join(names)}; keep one of them.")
    if folders and "train" not in folders:
        name = next(iter(folders.values()))[0]
        raise UserError(
            f"{where} has a folder {name} but no train folder; give {where / name} to split it, or, if it is "
            "a class, move all class folders into a folder named train."
        )
    if folders.keys() <= {"train", "test"} and folders and others:
        both = f"{folders['train'][0]} and {others[-1] or 'loose files'}"
        raise UserError(
            f"{where} has no val folder, but samples in {both}; if these are classes, move all class folders "
            "into a folder named train, otherwise move the others away."
        )
    return folders


def _labelled(
    found: Found, sources: Sequence[str], below: str, left_out: dict[str, tuple[int, str]]
) -> list[Listed]:
    """Sources below a split's folder with their classes: the first folder below it.

    Videos of one folder that differ only in their suffix are one sample; the others are added to `left_out`.
    """
    twins: dict[str, list[str]] = {}
    for source in sources:
        twins.setdefault(stem_of(source) if found.kind is VIDEOS else source, []).append(source)
    listed: list[Listed] = []
    for paths in twins.values():
        source, *others = sorted(paths)
        listed.append(listed_as(found.kind, source, _head(source, below), others))
        for other in others:
            _count(left_out, TWINS, other)
    if len({not item.label for item in listed}) == 2:
        loose = min(item.source for item in listed if not item.label)
        raise UserError(
            f"{found.root / below} contains both class folders and loose {found.kind.what}, such as "
            f"{readable(loose)}; move one of the two elsewhere."
        )
    return listed


def listed_as(kind: Kind, source: str, label: str, others: Sequence[str] = ()) -> Listed:
    """A source with its readable name and its group. others: other files of the same video."""
    name = source.rpartition("/")[2]
    dot = 0 if kind.folders else name.rfind(".")
    name = name[:dot] if 0 < dot < len(name) - 1 else name
    return Listed(source, label, name, "" if kind is PICTURES else group_of(name, label), tuple(others))


def stem_of(path: str) -> str:
    """A path without the suffix of a picture or video."""
    dot = path.rfind(".")
    return path[:dot] if path[dot:].lower() in MEDIA else path


def group_of(name: str, label: str) -> str:
    """The video from which a clip was cut, if its name tells; otherwise ""."""
    found = SOURCE_VIDEO.fullmatch(name)
    if found is None:
        return ""
    video = next(group for group in found.groups() if group)
    return video.removesuffix(f"_{label}")  # HMDB51: the class follows the video
