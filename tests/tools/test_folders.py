"""Layouts of folders: recognized, rejected with an explanation, and split without dividing a source video."""

import os
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipelines.errors import UserError
from tests.test_project import call_make
from tests.tools.test_pack import encoded, pixels, rows_of, write
from tests.tools.test_pack_videos import make, numbered
from tools.folders import FRAMES, PICTURES, VIDEOS, Kind, by_folder, find_sources
from tools.listing import Listed, Listing, display_names, plan_of, split_off
from tools.pack import ClipOptions, ImageOptions, ListOptions, pack_all, pack_clips, pack_images
from tools.verify import verify


def tree(root: Path, *paths: str) -> Path:
    """Empty files, and for paths that end in a slash empty folders."""
    for path in paths:
        place = root / path
        place.mkdir(parents=True, exist_ok=True) if path.endswith("/") else write(place, b"")
    return root


def listed(root: Path, kind: Kind = PICTURES) -> dict[str, list[tuple[str, str]]]:
    """{split: [(source, class)]}; without a validation split only train."""
    listing = by_folder(find_sources(root, kind))
    splits = {"train": listing.train, **({} if listing.val is None else {"val": listing.val})}
    return {split: [(item.source, item.label) for item in items] for split, items in splits.items()}


def problem(root: Path, kind: Kind = PICTURES) -> str:
    with pytest.raises(UserError) as caught:
        by_folder(find_sources(root, kind))
    text = str(caught.value)
    assert "\n" not in text and "; " in text and text.endswith("."), text
    return text


# ---- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("Train", "Val"),
        ("training", "validation"),
        ("TRAIN", "valid"),
        ("train.X1", "val.X"),
        ("train", "test"),
        ("data/set/train", "data/set/val"),
    ],
)
def test_split_folders_are_recognized(tmp_path, train, val):
    tree(tmp_path, f"{train}/cat/1.jpg", f"{train}/dog/2.JPEG", f"{val}/cat/3.png", "readme.txt")
    assert listed(tmp_path) == {
        "train": [(f"{train}/cat/1.jpg", "cat"), (f"{train}/dog/2.JPEG", "dog")],
        "val": [(f"{val}/cat/3.png", "cat")],
    }


def test_parts_of_a_split_are_united(tmp_path):
    tree(tmp_path, "train.X1/a/1.jpg", "train.X2/b/1.jpg", "train.X3/a/2.jpg", "val.X/b/3.jpg")
    found = listed(tmp_path)
    assert found["train"] == [("train.X1/a/1.jpg", "a"), ("train.X2/b/1.jpg", "b"), ("train.X3/a/2.jpg", "a")]
    assert found["val"] == [("val.X/b/3.jpg", "b")]


def test_class_folders_and_loose_pictures_without_splits(tmp_path):
    tree(tmp_path / "classes", "a/1.jpg", "a/deep/er/2.jpg", "b/1.jpg")
    assert listed(tmp_path / "classes") == {
        "train": [("a/1.jpg", "a"), ("a/deep/er/2.jpg", "a"), ("b/1.jpg", "b")]
    }
    assert listed(tree(tmp_path / "loose", "1.jpg", "2.jpg")) == {"train": [("1.jpg", ""), ("2.jpg", "")]}
    assert listed(tree(tmp_path / "one", "a/1.jpg")) == {"train": [("a/1.jpg", "a")]}


def test_a_dataset_one_folder_too_high_is_found(tmp_path, capsys):
    tree(tmp_path, "flowers/rose/1.jpg", "flowers/tulip/2.jpg", "notes/readme.txt", "license")
    assert listed(tmp_path) == {"train": [("flowers/rose/1.jpg", "rose"), ("flowers/tulip/2.jpg", "tulip")]}
    assert "contains only flowers: its folders are used" in capsys.readouterr().out


def test_test_is_validation_only_without_val_and_with_the_same_labelling(tmp_path, capsys):
    tree(tmp_path / "both", "train/a/1.jpg", "val/a/2.jpg", "test/a/3.jpg")
    assert listed(tmp_path / "both")["val"] == [("val/a/2.jpg", "a")]
    tree(tmp_path / "flat", "train/a/1.jpg", "test/3.jpg")
    assert listed(tmp_path / "flat") == {"train": [("train/a/1.jpg", "a")]}
    capsys.readouterr()
    assert listed(tree(tmp_path / "only", "train/a/1.jpg", "test/a/3.jpg"))["val"] == [("test/a/3.jpg", "a")]
    assert "no val folder: test becomes the validation split" in capsys.readouterr().out


def test_what_systems_add_is_ignored_and_other_files_are_counted(tmp_path):
    tree(
        tmp_path,
        *(
            "train/a/1.jpg",
            "train/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg",
            "train/a/@eaDir/x.jpg",
            "val/a/1.jpg",
        ),
        *("__MACOSX/train/a/._1.jpg", "train/.DS_Store", "train/a/Thumbs.db", "train/a/notes.txt", "LICENSE"),
        *("train/empty/", "train/texts/readme.TXT", "test/5.jpg"),
    )
    listing = by_folder(find_sources(tmp_path, PICTURES))
    assert [item.source for item in (*listing.train, *(listing.val or ()))] == [
        "train/a/1.jpg",
        "val/a/1.jpg",
    ]
    assert listing.left_out == {
        ".txt files": (2, "train/a/notes.txt"),
        "other files": (1, "LICENSE"),
        ".DS_Store files": (1, "train/.DS_Store"),
        "Thumbs.db files": (1, "train/a/Thumbs.db"),
        "folders without samples": (2, "train/empty"),
        "pictures in test": (1, "test/5.jpg"),
    }


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["val/a/1.jpg"], "has a folder val but no train folder"),
        (["train/1.jpg", "Train/2.jpg"], "several train folders, Train and train"),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/2.jpg"], "several val folders, val and valid"),
        (["train/1.jpg", "bus/1.jpg", "car/1.jpg"], "no val folder, but samples in train and car"),
        (["test/1.jpg", "rain/1.jpg"], "has a folder test but no train folder"),
        (["train/a/1.jpg", "val/"], "val contains no samples"),
        (["a/1.jpg", "2.jpg"], "contains both class folders and loose pictures, such as 2.jpg"),
        (["train/a/1.jpg", "train/2.jpg"], "loose pictures, such as train/2.jpg"),
        (["a/1.mp4"], "contains no pictures (.bmp .gif"),
        ([], "contains no pictures"),
    ],
)
def test_layouts_with_two_meanings_are_rejected(tmp_path, paths, words):
    assert words in problem(tree(tmp_path, *paths))


def test_a_folder_with_pictures_and_clips_is_no_clip(tmp_path):
    paths = ["cover.jpg", "one/1.jpg", "two/1.jpg"]
    assert "contains both pictures and folders of pictures" in problem(tree(tmp_path, *paths), FRAMES)


# ---- clips -------------------------------------------------------------------------------------------------


def test_videos_and_frame_folders_in_class_folders(tmp_path):
    tree(tmp_path / "videos", "train/a/x.mp4", "train/b/y.MKV", "train/b/y.json", "val/a/z.webm")
    assert listed(tmp_path / "videos", VIDEOS) == {
        "train": [("train/a/x.mp4", "a"), ("train/b/y.MKV", "b")],
        "val": [("val/a/z.webm", "a")],
    }
    tree(tmp_path / "frames", "a/x/1.jpg", "a/x/2.jpg", "a/y.avi/1.png", "b/z/1.jpg", "b/none/")
    assert listed(tmp_path / "frames", FRAMES) == {"train": [("a/x", "a"), ("a/y.avi", "a"), ("b/z", "b")]}
    assert listed(tree(tmp_path / "loose", "x/1.jpg", "y/1.jpg"), FRAMES) == {"train": [("x", ""), ("y", "")]}
    tree(tmp_path / "high", "jpegs/a/x/1.jpg", "jpegs/b/y/1.jpg")
    assert listed(tmp_path / "high", FRAMES) == {"train": [("jpegs/a/x", "a"), ("jpegs/b/y", "b")]}
    nested = problem(tree(tmp_path / "nested", "a/x/1.jpg", "a/x/masks/1.jpg", "b/y/1.jpg"), FRAMES)
    assert "a/x contains both pictures and folders of pictures" in nested
    assert "both class folders and loose" in problem(tree(tmp_path / "mixed", "a/x/1.jpg", "y/1.jpg"), FRAMES)


def groups(items: Iterable[Listed]) -> set[str]:
    return {item.group for item in items}


def test_clips_of_one_video_stay_in_one_split(tmp_path):
    names = {
        "HandStand": [f"v_HandStand_g{g:02}_c{c:02}" for g in range(1, 26) for c in range(1, 6)],
        "brush_hair": [
            f"Film {n}!_brush_hair_{body}_nm_np1_ba_goo_{part}"
            for n in range(20)
            for body in "fu"
            for part in (0, 1)
        ],
        "abseiling": [f"-_{n:09}_{start:06}_{start + 10:06}" for n in range(20) for start in (1, 40)],
        "own": [f"clip_{n}" for n in range(20)],
    }
    tree(tmp_path, *(f"{label}/{name}.avi" for label, found in names.items() for name in found))
    listing = by_folder(find_sources(tmp_path, VIDEOS))
    assert {label: len(groups(item for item in listing.train if item.label == label)) for label in names} == {
        "HandStand": 25,
        "brush_hair": 20,
        "abseiling": 20,
        "own": 1,  # no name of a video: each is a group of its own
    }
    train, val = split_off(listing.train, 0.2)
    assert groups(train) & groups(val) == {""}
    share = {label: sum(item.label == label for item in val) / len(found) for label, found in names.items()}
    assert share == {"HandStand": 0.2, "brush_hair": 0.2, "abseiling": 0.2, "own": 0.2}


def test_a_video_with_clips_of_two_classes_is_in_one_split():
    items = [Listed(f"{label}/{n}", label, group=f"video {n}") for label in "ab" for n in range(10)]
    train, val = split_off(items, 0.3)
    assert len(val) == 6 and not groups(train) & groups(val)


def test_a_class_keeps_a_video_in_train():
    train, val = split_off([Listed("1", "a", group="x"), Listed("2", "a", group="x"), Listed("3", "b")], 0.9)
    assert len(train) == 3 and not val


def test_classes_without_validation_samples_are_counted(capsys):
    items = [
        Listed(f"{label}/{n}", label) for label, count in (("many", 20), ("few", 5)) for n in range(count)
    ]
    plan_of("image", Listing(items), 0.1, ImageOptions().packing(), "here")
    out = capsys.readouterr().out
    assert "with --val-fraction 0.1, 2 of 25 samples become it; classes without a sample in it: 1" in out
    for fraction, few in ((0.0, items), (0.1, items[:20])):  # no validation is wanted; every class has one
        plan_of("image", Listing(few), fraction, ImageOptions().packing(), "here")
        assert capsys.readouterr().out.endswith("samples become it\n")


def test_files_of_one_video_are_one_sample(tmp_path):
    """They were two samples, of which one could fall into each split."""
    names = [f"{label}/c{n}{suffix}" for label in "ab" for n in range(10) for suffix in (".mp4", ".mkv")]
    tree(tmp_path, *names, "a/c1.json", "a/d/c1.mp4")
    listing = by_folder(find_sources(tmp_path, VIDEOS))
    files = {item.source: item.others for item in listing.train}
    assert len(files) == 21 and files["a/c2.mkv"] == ("a/c2.mp4",) and files["a/d/c1.mp4"] == ()
    assert listing.left_out["other files of the same video"] == (20, "a/c0.mp4")
    tree(tmp_path / "s", "train/a/1.mp4", "train/a/1.avi", "val/a/2.mp4")
    split = by_folder(find_sources(tmp_path / "s", VIDEOS))
    assert [item.source for item in split.train] == ["train/a/1.avi"]
    assert split.left_out == {"other files of the same video": (1, "train/a/1.mp4")}
    pictures = tree(tmp_path / "p", "a/1.jpg", "a/1.png")
    assert len(by_folder(find_sources(pictures, PICTURES)).train) == 2


# ---- names of classes --------------------------------------------------------------------------------------


def test_classes_are_identified_by_bytes(tmp_path, capsys):
    """All names of one character in GB2312: each is a class of its own, though some are also UTF-8."""
    raw = [bytes((high, low)) for high in range(0xB0, 0xF8) for low in range(0xA1, 0xFF)]
    names = [os.fsdecode(name) for name in raw if name[0] != 0xD7 or name[1] <= 0xF9]
    items = [Listed(f"{name}/1.jpg", name) for name in names]
    plan = plan_of("image", Listing(items), 0.0, ImageOptions().packing(), "here")
    assert len({*plan.classes}) == len(names) == 6763
    assert {*plan.classes} == {os.fsencode(name).decode("gb18030") for name in names}
    assert "not UTF-8: they are decoded as gb18030" in capsys.readouterr().out


def test_display_names_are_distinct_and_readable():
    latin = [os.fsdecode(name.encode("latin-1")) for name in ("café", "naïve", "Ærø", "plain")]
    assert [*display_names(latin).values()] == ["café", "naïve", "Ærø", "plain"]
    mixed = ["日本 🎈", os.fsdecode(b"latin-\xe9"), "latin-\\xe9"]
    assert [*display_names(mixed).values()] == ["日本 🎈", "latin-\\xe9 (2)", "latin-\\xe9"]


def test_spellings_of_one_class_are_united(tmp_path, capsys):
    composed, split = (unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD"))
    tree(tmp_path, f"train/{composed}/1.jpg", f"train/{split}/2.jpg", f"val/{split}/3.jpg", "train/x/4.jpg")
    plan = plan_of("image", by_folder(find_sources(tmp_path, PICTURES)), 0, ImageOptions().packing(), "")
    assert plan.classes == ["x", composed]
    assert sorted(sample.label for sample in plan.splits["train"]) == [0, 1, 1]
    assert [sample.label for sample in plan.splits["val"]] == [1]
    assert "(NFC, NFD) are merged, such as Äpfel (1)" in capsys.readouterr().out
    alone = [Listed("1", split)]
    assert plan_of("image", Listing(alone), 0, ImageOptions().packing(), "").classes == [split], "as before"


# ---- through the command -----------------------------------------------------------------------------------


def test_videos_in_class_folders_are_packed_by_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for label, first in (("Jump", 0), ("Run", 60)):
        for group in range(1, 4):
            for clip in range(1, 3):
                number = first + 10 * group + 5 * clip
                make(
                    tmp_path / f"UCF-101/{label}/v_{label}_g{group:02}_c{clip:02}.avi",
                    [numbered(number + frame) for frame in range(4)],
                )
    write(tmp_path / "UCF-101/Jump/readme.txt", b"mine")
    assert pack_all(ListOptions(workers=1, val_fraction=0.3), videos=Path("UCF-101")) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "classes 2 Jump, Run" in out and "left out: .txt files 1 Jump/readme.txt" in out
    rows = {split: rows_of(tmp_path / "shards/kinetics", split) for split in ("train", "val")}
    videos = {split: {row["source"].rpartition("_")[0] for row in found} for split, found in rows.items()}
    assert len(rows["val"]) == 4 and len(videos["val"]) == 2 and not videos["train"] & videos["val"]
    assert {row["class_name"]: row["label"] for row in rows["train"]} == {"Jump": 0, "Run": 1}
    assert all(row["frames"] == 4 for found in rows.values() for row in found)
    assert verify(tmp_path / "shards/kinetics") == 0


def test_frame_folders_in_class_folders_are_packed_by_one_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 2), ("val", 1)):
        for label in "ab":
            for clip in range(count):
                for frame in range(3):
                    data = encoded(pixels(100 * clip + 10 * ord(label) + frame + (split == "val")))
                    write(Path(f"own/{split}/{label}/clip{clip}/{frame}.jpg"), data)
    assert pack_all(ListOptions(workers=1), frames=Path("own")) == 0
    rows = [(row["source"], row["label"], row["frames"]) for row in rows_of(Path("shards/kinetics"), "val")]
    assert sorted(rows) == [("val/a/clip0", 0, 3), ("val/b/clip0", 1, 3)]
    options = ClipOptions(workers=1)
    assert pack_clips(None, Path("other"), options, frames=Path("own")) == 0
    assert rows_of(Path("other")) == rows_of(Path("shards/kinetics"))


def test_only_the_given_folders_are_packed(tmp_path, monkeypatch, capsys):
    """VIDEOS=DIR also packed data/imagenet."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/imagenet", "mine"):
        for number in range(4):
            write(Path(f"{name}/a/{number}.jpg"), encoded(pixels(number)))
    for clip in ("clip1", "clip2"):
        write(Path(f"own/a/{clip}/1.jpg"), encoded(pixels(7)))
    assert pack_all(ListOptions(workers=1), frames=Path("own"), out=Path("one")) == 0
    assert [path.name for path in Path("one").iterdir()] == ["kinetics"]
    assert pack_all(ListOptions(workers=1), images=Path("data/imagenet"), out=Path("two")) == 0
    capsys.readouterr()
    assert pack_all(ListOptions(workers=1), out=Path("three")) == 0
    assert "data/tiny-kinetics-400 does not exist: it is not packed" in capsys.readouterr().out
    assert [path.name for folder in ("two", "three") for path in Path(folder).iterdir()] == ["imagenet"] * 2


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_passes_only_the_folders_that_are_given():
    for given in ("IMAGES", "FRAMES", "VIDEOS"):
        command = call_make("-n", "shards", f"{given}=my folder").splitlines()[-1].split("tools.pack ")[1]
        assert command.split() == ["all", f"--{given.lower()}", "'my", "folder'"]
    assert call_make("-n", "shards").split()[-2:] == ["tools.pack", "all"]


def test_the_table_shows_classes_and_what_is_left_out(tmp_path, capsys):
    for number, label in enumerate("abcde"):
        write(tmp_path / f"in/{label}/1.jpg", encoded(pixels(number)))
    tree(tmp_path / "in", "a/1.xml", "b/1.xml", "c/old/")
    for _ in range(2):  # the second time, it is already packed
        assert pack_images(tmp_path / "in", tmp_path / "out", ImageOptions(workers=1)) == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "classes 5 a, b, c, ..." in out
        assert "left out: .xml files 2 a/1.xml" in out and "left out: folders without samples 1 c/old" in out
    write(tmp_path / "flat/1.jpg", encoded(pixels(1)))
    assert pack_images(tmp_path / "flat", tmp_path / "flat out", ImageOptions(workers=1)) == 0
    assert "classes 0 the samples have no classes" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )
