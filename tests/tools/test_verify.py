"""Verification finds and names every kind of damage, and accepts a good dataset."""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import UserError
from tests.pipelines_fixtures import write_rows
from tests.tools.test_pack import (
    CLIPS,
    clip_tree,
    encoded,
    image_tree,
    pack_clips,
    pack_images,
    pixels,
    rows_of,
    write,
)
from tools import verify as module
from tools.verify import verify


@pytest.fixture(scope="module")
def good_images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify images")
    source = image_tree(root / "source", train=6, val=2)
    write(source / "train/n01/bad.jpg", b"")
    pack_images(source, root / "out", max_reject=1.0)
    return root / "out"


@pytest.fixture(scope="module")
def good_clips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify clips")
    pack_clips(clip_tree(root / "source", CLIPS), root / "out")
    return root / "out"


@pytest.fixture
def images(good_images, tmp_path) -> Path:
    return Path(shutil.copytree(good_images, tmp_path / "images"))


@pytest.fixture
def clips(good_clips, tmp_path) -> Path:
    return Path(shutil.copytree(good_clips, tmp_path / "clips"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def change_row(root: Path, split: str, index: int, **values) -> dict:
    """Give a row of the catalogue other values; return it as it was."""
    rows = rows_of(root, split)
    before = dict(rows[index])
    rows[index].update(values)
    write_rows(root, rows, split)
    return before


def faults(root: Path, capsys) -> list[str]:
    """What `verify` says is wrong; its exit code must fit."""
    code = verify(root)
    lines = capsys.readouterr().out.splitlines()
    found = [line.removeprefix("fault: ") for line in lines if line.startswith("fault: ")]
    assert code == int(bool(found))
    return found


def test_good_datasets_pass_with_one_line_per_split(good_images, good_clips, capsys):
    assert verify(good_images) == verify(good_clips) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 18 samples, 1 rejected, 18 frames; 3 classes of 6 to 6 samples; faults: 0",
        "val: 6 samples, 0 rejected, 6 frames; 3 classes of 2 to 2 samples; faults: 0",
        "train: 8 samples, 0 rejected, 48 frames; 2 classes of 4 to 4 samples; faults: 0",
        "val: 2 samples, 0 rejected, 12 frames; 2 classes of 1 to 1 samples; faults: 0",
    ]


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_any_flipped_byte_and_any_cut_of_a_shard_is_found(clips, capsys, suffix):
    path = clips / f"train/000001.{suffix}"
    whole = path.read_bytes()
    for place in np.random.default_rng().integers(0, len(whole), 25).tolist():
        flip(path, place)
        assert faults(clips, capsys), f"the flip at byte {place} was missed"
        path.write_bytes(whole[:place])
        assert faults(clips, capsys), f"the cut at byte {place} was missed"
        path.write_bytes(whole)
    assert faults(clips, capsys) == []


def test_a_flipped_byte_in_a_frame_names_shard_and_sample(images, capsys):
    row = next(row for row in rows_of(images) if row["shard"] == 1)
    flip(images / "train/000001.tar", row["offsets"][0] + row["sizes"][0] // 2)
    (found,) = faults(images, capsys)
    assert found.startswith(f"{images}/train/000001.tar: {row['key']}: its checksum differs")


Damage = Callable[[Path], object]
TRAIN = "train/000001"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "cut tar": (
        lambda root: (root / f"{TRAIN}.tar").write_bytes((root / f"{TRAIN}.tar").read_bytes()[:6000]),
        f"{TRAIN}.tar is cut off",
    ),
    "tar without its closing blocks": (
        lambda root: (root / f"{TRAIN}.tar").write_bytes((root / f"{TRAIN}.tar").read_bytes().rstrip(b"\0")),
        f"{TRAIN}.tar does not end at byte .*is cut off",
    ),
    "tar with more zeros at its end": (
        lambda root: os.truncate(root / f"{TRAIN}.tar", 1 << 20),
        f"{TRAIN}.tar is missing or does not have the length that was packed",
    ),
    "stray bytes in a header whose sum stays right": (  # tar allows a sum of signed bytes
        lambda root: overwrite(root / f"{TRAIN}.tar", 475, b"\x10\xf0"),
        f"{TRAIN}.tar: .*differ from the catalogue at byte 0 or later",
    ),
    "crc": (lambda root: change_row(root, "val", 0, crcs=[7]), "val/.*its checksum differs"),
    "sha256 that is none": (
        lambda root: change_row(root, "val", 0, sha256=""),
        "val/.*its checksum differs",
    ),
    "empty tar": (lambda root: (root / f"{TRAIN}.tar").write_bytes(b""), f"{TRAIN}.tar is cut off"),
    "missing tar": (lambda root: (root / f"{TRAIN}.tar").unlink(), f"{TRAIN}.tar or its .idx cannot be read"),
    "missing index": (lambda root: (root / f"{TRAIN}.idx").unlink(), f"{TRAIN}.tar or its .idx cannot"),
    "wrong offset in the index": (
        lambda root: (root / f"{TRAIN}.idx").write_text(
            (root / f"{TRAIN}.idx").read_text().replace("jpg 512 ", "jpg 1024 ", 1)
        ),
        f"{TRAIN}.idx does not match its tar",
    ),
    "strange shard": (
        lambda root: (root / "train/000077.tar").write_bytes(b""),
        "train/000077.tar belongs to no shard; delete it",
    ),
    "swapped shards": (
        lambda root: [
            shutil.copy(root / f"train/000000{suffix}", root / f"{TRAIN}{suffix}")
            for suffix in (".tar", ".idx")
        ],
        f"{TRAIN}.tar: .*differ from the catalogue at byte 0 or later",
    ),
    "label": (
        lambda root: change_row(root, "train", 3, label=(rows_of(root)[3]["label"] + 1) % 3),
        "labels differ from the catalogue",
    ),
    "class name": (
        lambda root: change_row(root, "train", 3, class_name="cat"),
        "has no class 'cat' with label",
    ),
    "source": (lambda root: change_row(root, "train", 3, source="x"), "labels differ from the catalogue"),
    "offset": (
        lambda root: change_row(root, "train", 3, offsets=[512 * 3]),
        "differ from the catalogue",
    ),
    "checksum": (lambda root: change_row(root, "val", 0, sha256="0" * 64), "val/.*its checksum differs"),
    "shard": (
        lambda root: change_row(root, "train", 3, shard=9),
        "its shard numbers are out of order or too large",
    ),
    "lost row": (
        lambda root: write_rows(root, rows_of(root)[:-1]),
        "train.arrow .*it has 18 rows, but dataset.json has 19",
    ),
    "damaged catalogue": (
        lambda root: (root / "train.arrow").write_bytes((root / "train.arrow").read_bytes()[:900]),
        "train.arrow cannot be read",
    ),
    "missing catalogue": (lambda root: (root / "val.arrow").unlink(), "val.arrow is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(images, capsys, name):
    damage, sentence = DAMAGES[name]
    damage(images)
    found = faults(images, capsys)
    assert any(re.search(sentence, line) for line in found), found


def test_a_frame_that_does_not_decode_is_named(clips, capsys):
    """Also where its checksum is right, as in a dataset that another tool packed."""
    row = rows_of(clips)[1]
    tar = clips / f"train/{row['shard']:06d}.tar"
    data = bytearray(tar.read_bytes())
    start, size = row["offsets"][2], row["sizes"][2]
    data[start : start + size] = bytes(size)
    tar.write_bytes(data)
    frames = [bytes(data[at : at + n]) for at, n in zip(row["offsets"], row["sizes"], strict=True)]
    sums = {"sha256": hashlib.sha256(b"".join(frames)).hexdigest(), "crcs": [*map(zlib.crc32, frames)]}
    change_row(clips, "train", 1, **sums)
    (fault,) = faults(clips, capsys)
    assert fault.startswith(f"{tar}: {row['key']}: frame 2 at byte {start} does not decode; pack")


def test_a_wrong_size_in_the_catalogue_is_found(images, capsys):
    before = change_row(images, "val", 2, width=99)
    assert any("differ from the catalogue" in fault for fault in faults(images, capsys))
    tar = np.fromfile(images / "val/000000.tar", np.uint8)
    assert list(module.decode_faults(tar, [before])) == []
    (fault,) = module.decode_faults(tar, [before | {"width": 99}])
    assert fault.endswith("is 80x60, in the catalogue 99x60; pack this dataset again")


def test_a_sample_in_two_splits_is_a_fault_and_repeats_are_counted(tmp_path, capsys):
    source = image_tree(tmp_path / "source", train=3, val=2)
    same = encoded(pixels(77))
    for place in ("train/n01/one.jpg", "train/n01/two.jpg", "val/n03/three.jpg"):
        write(source / place, same)
    pack_images(source, tmp_path / "out")
    capsys.readouterr()
    code = verify(tmp_path / "out")
    train, val, *found = capsys.readouterr().out.splitlines()
    assert code == 1 and len(found) == 1
    assert "val/n03/three.jpg) in val has the same frames as" in found[0] and "in train" in found[0]
    assert "repeated samples: 1" in train and "repeated" not in val


def test_many_faults_are_cut_short_and_empty_classes_are_counted(images, capsys):
    for index in range(18):
        change_row(images, "train", index, source="elsewhere")
    info = json.loads((images / "dataset.json").read_text())
    info["classes"].append("n04")
    (images / "dataset.json").write_text(json.dumps(info))
    assert verify(images) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("fault: ") for line in lines) == module.SHOWN
    assert lines[-1].startswith("and ") and lines[-1].endswith(" more faults")
    assert "4 classes of 0 to 6 samples, 1 of them empty" in lines[0]


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        verify(tmp_path)


def test_a_catalogue_other_than_the_recorded_one_is_a_fault(images, tmp_path, capsys):
    root = shutil.copytree(images, tmp_path / "changed")
    with (root / "val.arrow").open("ab") as file:
        file.write(b"\0")
    assert faults(root, capsys) == [
        f"{root}/val.arrow cannot be read (its checksum is not the one in dataset.json); "
        "pack this dataset again"
    ]


def test_a_catalogue_whose_texts_are_damaged_is_a_fault(images, capsys):
    """Its numbers are right and its checksum fits, so it opens; a name is not UTF-8."""
    path, name = images / "train.arrow", rows_of(images, "train")[0]["source"].encode()
    path.write_bytes(path.read_bytes().replace(name, b"\xff" * len(name)))
    info = json.loads((images / "dataset.json").read_text())
    info["catalogue_sha256"]["train"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (images / "dataset.json").write_text(json.dumps(info))
    assert verify(images) == 1
    assert re.search(r"fault: .*train\.arrow cannot be read \(", capsys.readouterr().out)
