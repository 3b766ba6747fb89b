"""Tars of other programs, indexed in place: the same batches, the same samples, nothing lost in silence."""

import contextlib
import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines.config import DataConfig
from pipelines.dataset import check_shards, open_dataset, read_info
from pipelines.errors import UserError
from tests import LONG
from tests.pipelines_fixtures import evaluation, read_rows, train
from tests.tools.test_pack import (
    CLIPS,
    by_dali,
    by_webdataset,
    clip_tree,
    encoded,
    image_tree,
    pack_clips,
    pack_images,
    pixels,
    sums,
)
from tests.train.test_runs import assert_same, fit, kill_at_row
from tests.train_helpers import ROOT, arguments, call, module, picture, small
from tools import sources
from tools.stage import stage
from tools.tarfiles import CUT_OFF, expand
from tools.tars import NO_CLASS, TarOptions, pack_tars
from tools.tarsamples import NO_PICTURE
from tools.verify import verify
from train import finetune

Member = tuple[str, bytes] | tarfile.TarInfo


def index(train: Path | str, out: Path | None = None, *, val: Path | str = "", **options) -> int:
    settings = TarOptions(**{"workers": 1, "max_reject": 1.0, "val_fraction": 0.0, **options})
    return pack_tars(str(train), settings, val=str(val), out=out)


def shard_writer(folder: Path, count: int, per_tar: int = 10, first: int = 0) -> str:
    """Tars of webdataset.ShardWriter with pictures of two classes; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "t-%04d.tar"), maxcount=per_tar, verbose=0) as writer:
        for n in range(count):
            writer.write({"__key__": f"n/{n:05d}", "jpg": picture(n % 2, first + n), "cls": n % 2})
    return str(folder / f"t-{{0000..{-(-count // per_tar) - 1:04d}}}.tar")


def write_tar(path: Path, members: Sequence[Member], **options) -> Path:
    """A tar of (name, content) pairs and of headers without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))
    return path


def outcomes(root: Path, split: str = "train") -> dict[str, str]:
    """The reason for each rejected sample, and the change of each other one."""
    return {row["key"]: row["reason"] or row["change"] for row in read_rows(root, split)}


# ---- our own tars as if another program had written them -------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video"])
def test_our_tars_in_place_give_identical_batches(kind, tmp_path):
    packed, found = tmp_path / "packed", tmp_path / "found"
    if kind == "image":
        pack_images(image_tree(tmp_path / "source"), packed)
    else:
        pack_clips(clip_tree(tmp_path / "source", CLIPS), packed)
    tars = {split: packed / split / "*.tar" for split in ("train", "val")}
    assert index(tars["train"], found, val=tars["val"]) == 0
    info = read_info(found)
    assert (info.kind, info.classes, info.fps or 30) == (kind, read_info(packed).classes, 30)
    config = DataConfig(size=32, frames=1 if kind == "image" else 4)
    for split in ("train", "val"):
        own, foreign = open_dataset(packed, split), open_dataset(found, split)
        shards = np.unique(own.shard).tolist()
        assert [own.tar_path(n) for n in shards] == [foreign.tar_path(n) for n in shards]
        columns = ("label", "width", "height", "first_frame", "offset", "size", "crc", "shard")
        for name in columns:
            assert np.array_equal(getattr(own, name), getattr(foreign, name)), name
    pairs = [
        (train(open_dataset(root, "train"), config, 5), evaluation(open_dataset(root, "val"), config, 2))
        for root in (packed, found)
    ]
    for own, foreign in zip(*([*a, *b] for a, b in pairs), strict=True):
        assert np.array_equal(own.pixels.numpy(), foreign.pixels.numpy())
        assert np.array_equal(own.labels.numpy(), foreign.labels.numpy())
    assert verify(found) == 0


def test_webdataset_and_dali_count_the_samples_of_the_catalogue(tmp_path):
    index(shard_writer(tmp_path / "data", 37), tmp_path / "out")
    tars = sorted((tmp_path / "data").glob("*.tar"))
    dataset = open_dataset(tmp_path / "out", "train")
    jpegs = [
        jpeg.tobytes()
        for jpeg in dataset.read(np.arange(len(dataset)), np.zeros((len(dataset), 1), np.int64))
    ]
    expected = [
        (jpeg, str(label).encode()) for jpeg, label in zip(jpegs, dataset.label.tolist(), strict=True)
    ]
    assert len(dataset) == 37
    assert by_webdataset(tars, ["jpg", "cls"]) == expected
    assert by_dali(tars, ["jpg", "cls"], indexed=False) == expected


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_on_tars_of_webdataset_are_the_same_after_a_resume_within_an_epoch(world, tmp_path):
    index(shard_writer(tmp_path / "data", 40), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", "train")
    for rank in range(world):
        options = {"batch": 12, "rank": rank, "world": world}
        whole = train(dataset, DataConfig(size=32), 7, **options)
        resumed = train(dataset, DataConfig(size=32), 5, start_step=2, **options)
        for a, b in zip(whole[2:], resumed, strict=True):
            assert np.array_equal(a.rows.ids, b.rows.ids)
            assert np.array_equal(a.pixels.numpy(), b.pixels.numpy())


@pytest.mark.parametrize("processes", [pytest.param(n, marks=LONG) for n in (1, 2, 4)])
def test_training_on_tars_of_webdataset_resumes_bit_exactly(processes, tmp_path, capsys):
    """After SIGKILL within an epoch, the weights are those of a run without interruption."""
    train_tars, val_tars = shard_writer(tmp_path / "train", 40), shard_writer(tmp_path / "val", 14, first=500)
    index(train_tars, tmp_path / "out", val=val_tars)
    config = small("image-ft-pico", tmp_path / "out", tmp_path, "whole", epochs=5.0)
    speed = replace(config.speed, processes=processes, micro_batch=3)
    config = replace(config, speed=speed, mixup=0.0, cutmix=0.0)
    killed = replace(config, run=replace(config.run, name="killed"))
    for number, run in enumerate((config, killed)):
        command = module("train.finetune", "image-ft-pico", *arguments(run))
        if number:  # an epoch has 3.3 steps, and a checkpoint is written every 4
            kill_at_row(command, tmp_path / "killed/metrics.csv", random.randint(5, 9), signal.SIGKILL)
        if processes == 1:
            fit(run, finetune.make_task)
        else:
            done = call("train.finetune", "image-ft-pico", *arguments(run))
            assert done.returncode == 0, done.stderr
    assert "resumed from step" in (tmp_path / "killed/log.txt").read_text()
    assert_same(tmp_path / "whole", tmp_path / "killed")
    if processes == 1:
        use(tmp_path / "whole", tmp_path / "a.jpg")


def use(run: Path, file: Path) -> None:
    """Evaluate a run, predict with it and make its report."""
    file.write_bytes(picture(1, 3))
    device = ("--device", "cpu")
    for name, *words in (
        ("train.evaluate", *device),
        ("tools.predict", str(file), *device),
        ("tools.report",),
    ):
        done = call(name, str(run), *words)
        assert done.returncode == 0, done.stderr


def test_verify_and_stage_check_the_tars_of_others(tmp_path, capsys):
    pattern = shard_writer(tmp_path / "data", 25)
    index(pattern, val_fraction=0.3)
    data, copy = tmp_path / "data", tmp_path / "copy"
    assert verify(data) == 0
    stage(str(data), copy)
    assert verify(copy) == 0
    assert not any(path.startswith("/") for paths in read_info(copy).tars.values() for path in paths)
    assert len([*copy.rglob("*.tar")]) == 3, "the two splits share the tars"
    capsys.readouterr()
    stage(str(data), copy)
    assert "copied 0 MB in" in capsys.readouterr().out
    whole = (data / "t-0001.tar").read_bytes()
    row = next(row for row in read_rows(data) if row["source"].startswith("t-0001.tar"))
    damaged = bytearray(whole)
    damaged[row["offsets"][0] + 200] ^= 1
    (data / "t-0001.tar").write_bytes(damaged)
    assert verify(data) == 1
    assert f"t-0001.tar: {row['key']}: its checksum differs" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"t-0001.tar could not be copied .*{row['key']}"):
        stage(str(data), tmp_path / "other")
    (data / "t-0001.tar").write_bytes(whole)
    row = read_rows(data, "val")[0]
    place = data / row["source"].partition(".tar/")[0]
    place = place.with_name(f"{place.name}.tar")
    kept, damaged = place.read_bytes(), bytearray(place.read_bytes())
    damaged[row["offsets"][0] + 200] ^= 1
    place.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{place.name} could not be copied .*{row['key']}"):
        stage(str(data), tmp_path / "third")
    place.write_bytes(kept)
    row = next(row for row in read_rows(data) if row["source"].startswith("t-0001.tar"))
    with tarfile.open(data / "t-0001.tar") as tar:
        label = tar.getmember(f"{row['key']}.cls").offset_data
    (data / "t-0001.tar").write_bytes(whole[:label] + bytes([whole[label] ^ 1]) + whole[label + 1 :])
    assert verify(data) == 1
    assert (
        f"t-0001.tar: {row['key']}: the tar has it elsewhere or with another class" in capsys.readouterr().out
    )


# ---- what is used, and what is left out ------------------------------------------------------------------


def jpeg(**options) -> bytes:
    return encoded(pixels(3), **options)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


USES: dict[str, tuple[dict[str, bytes], str]] = {
    "jpg": ({"jpg": jpeg()}, "in place"),
    "jpeg in capitals": ({"JPEG": jpeg()}, "in place"),
    "progressive": ({"jpg": jpeg(progressive=True)}, "in place"),
    "gray": ({"jpg": encoded(pixels(3).convert("L"))}, "in place"),
    "larger than 256": ({"jpg": encoded(pixels(3, (900, 700)))}, "in place"),
    "bytes after its end": ({"jpg": jpeg() + b"more"}, "in place"),
    "rotated": ({"jpg": rotated()}, "turned upright as its EXIF says: needs --repack"),
    "cmyk": ({"jpg": encoded(pixels(3).convert("CMYK"))}, "CMYK to RGB: needs --repack"),
    "png": ({"png": encoded(pixels(3), "PNG")}, "PNG to JPEG: needs --repack"),
    "webp": ({"webp": encoded(pixels(3), "WEBP")}, "WEBP to JPEG: needs --repack"),
    "png with the suffix of a JPEG": ({"jpg": encoded(pixels(3), "PNG")}, "PNG to JPEG: needs --repack"),
    "truncated": ({"jpg": jpeg()[:900]}, "truncated"),
    "damaged": ({"jpg": b"no picture"}, "not an image"),
    "empty": ({"jpg": b""}, "empty file"),
    "none": ({"txt": b"a cat"}, NO_PICTURE),
    "clip": ({"f0000.jpg": jpeg(), "f0001.jpg": jpeg()}, "a clip among pictures"),
}


@pytest.mark.parametrize("repack", [False, True])
def test_samples_that_training_can_read_are_used_in_place_and_the_others_are_listed(repack, tmp_path, capsys):
    members = [
        (f"a/{number:03d}.{suffix}", data)
        for number, (files, _) in enumerate(USES.values())
        for suffix, data in files.items()
    ]
    tar = write_tar(tmp_path / "data/a.tar", members)
    index(tar, tmp_path / "out", repack=repack)
    expected = [what for _, what in USES.values()]
    if repack:
        expected = [
            f"repacked: {what.partition(':')[0]}" if what.endswith("--repack") else what for what in expected
        ]
    found = outcomes(tmp_path / "out")
    assert [found[f"a/{n:03d}"] for n in range(len(USES))] == expected
    assert verify(tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a.tar"]
    dataset = open_dataset(tmp_path / "out", "train")
    assert {Path(name).name for name in read_info(tmp_path / "out").tars["train"]} == {
        "a.tar",
        *(["000000.tar"] * repack),
    }
    whole = tar.read_bytes()
    jpegs = [jpeg.tobytes() for jpeg in dataset.read(np.arange(6), np.zeros((6, 1), np.int64))]
    assert all(jpeg in whole for jpeg in jpegs)
    train(dataset, DataConfig(size=32), 2)
    stage(str(tmp_path / "out"), tmp_path / "copy")
    assert verify(tmp_path / "copy") == 0


LABELS: dict[str, tuple[dict[str, bytes], int]] = {
    "json with a decimal": ({"json": b'{"label": 2.0}'}, 2),
    "cls": ({"cls": b"1"}, 1),
    "cls with a line end": ({"cls": b" 2\n"}, 2),
    "cls without a class": ({"cls": b"-1"}, -1),
    "cls before json": ({"cls": b"1", "json": b'{"label": 2}'}, 1),
    "label": ({"json": b'{"label": 2, "caption": "7"}'}, 2),
    "class": ({"json": b'{"class": "2"}'}, 2),
    "json of img2dataset": ({"json": b'{"caption": "a cat", "key": "0", "width": 3}', "txt": b"a cat"}, -1),
    "no number": ({"json": b'{"label": true}'}, -1),
    "damaged json": ({"json": b'{"label": '}, -1),
    "deep json": ({"json": b"[" * 100_000}, -1),
    "byte order mark": ({"cls": b"\xef\xbb\xbf2\r\n"}, 2),
    "json with a byte order mark": ({"json": b'\xef\xbb\xbf{"label": 2}'}, 2),
    "txt": ({"txt": b"2"}, 2),
    "caption": ({"txt": b"2 cats"}, -1),
    "number in a caption of img2dataset": ({"json": b'{"caption": " 2 ", "key": "0"}', "txt": b"2"}, -1),
    "nothing": ({}, -1),
}
LONG = "a file of more than 1,048,576 bytes in the tar"


def test_the_class_is_read_from_cls_json_or_txt(tmp_path):
    members = [
        (f"{number:03d}.{suffix}", data)
        for number, (files, _) in enumerate(LABELS.values())
        for suffix, data in {"jpg": encoded(pixels(number)), **files}.items()
    ]
    tar = write_tar(
        tmp_path / "a.tar",
        [*members, ("x.jpg", jpeg()), ("x.cls", b"0"), ("y.jpg", jpeg()), ("y.cls", bytes(2 << 20))],
    )
    index(tar, tmp_path / "out")
    rows = {row["key"]: row for row in read_rows(tmp_path / "out")}
    assert rows["y"]["reason"] == LONG
    assert read_info(tmp_path / "out").classes == ("0", "1", "2")
    for number, (name, (_, label)) in enumerate(LABELS.items()):
        row = rows[f"{number:03d}"]
        assert row["label"] == label, name
        assert row["reason"] == (NO_CLASS if label < 0 else ""), name
    assert verify(tmp_path / "out") == 0
    index(tar, tmp_path / "all", unlabelled=True)
    assert read_info(tmp_path / "all").classes == () and verify(tmp_path / "all") == 0
    assert {row["status"] for row in read_rows(tmp_path / "all")} == {"ok"}


def labelled(path: Path, *labels: str | dict) -> Path:
    """A tar with a picture for each label, a text for .cls or fields for .json."""
    members: list[Member] = []
    for number, label in enumerate(labels):
        seed = sum(path.name.encode()) + number
        members.append((f"{path.stem}{number}.jpg", encoded(pixels(seed))))
        text, suffix = (label, "cls") if isinstance(label, str) else (json.dumps(label), "json")
        members.append((f"{path.stem}{number}.{suffix}", text.encode()))
    return write_tar(path, members)


def test_names_of_classes(tmp_path):
    def classes(name: str, *labels: str | dict, **options) -> tuple[list[int], tuple[str, ...]]:
        index(labelled(tmp_path / f"{name}.tar", *labels), tmp_path / name, **options)
        assert verify(tmp_path / name) == 0
        return open_dataset(tmp_path / name, "train").label.tolist(), read_info(tmp_path / name).classes

    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    assert classes("named", "dog", "cat", "dog") == ([1, 0, 1], ("cat", "dog"))
    assert classes("gaps", "7", "0", "3") == ([2, 0, 1], ("0", "3", "7"))  # as in lists
    named = [{"label": n, "class_name": name} for n, name in ((9, "owl"), (4, "cat"))]
    assert classes("named gaps", *named) == ([1, 0], ("cat", "owl"))
    composed, parted = "café", "cafe\u0301"  # two spellings in Unicode
    assert classes("spelled", composed, parted, "owl") == ([0, 0, 1], (composed, "owl"))
    assert classes("spelled alike", parted, "owl") == ([0, 1], (parted, "owl"))
    assert classes("listed", "dog", "0", class_names=names) == ([1, 0], ("cat", "dog", "owl"))
    both = [{"label": 1, "class_name": "dog"}, {"label": 0, "class_name": "cat"}]
    assert classes("both", *both) == ([1, 0], ("cat", "dog"))
    assert classes("twice", *both, {"label": 1, "class_name": "cat"}) == ([1, 0, 1], ("0", "1"))


DISAGREE: dict[str, tuple[list, list, str]] = {
    "number": (["0", "1"], ["2"], r"has class '2', but training does not"),
    "name": (["cat", "dog"], ["owl"], r"has class 'owl', but training does not"),
    "numbers and names": (["0", "1"], ["cat"], r"has class 'cat', .* 0; give the name of each number with"),
    "another order": (
        [{"label": 0, "class_name": "cat"}, {"label": 1, "class_name": "dog"}],
        [{"label": 0, "class_name": "dog"}],
        r"calls class 0 'dog', training 'cat'",
    ),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_training_and_validation_must_agree_on_classes(case, tmp_path):
    first, second, message = DISAGREE[case]
    tars = labelled(tmp_path / "a.tar", *first), labelled(tmp_path / "b.tar", *second)
    with pytest.raises(UserError, match=message):
        index(tars[0], tmp_path / "out", val=tars[1])
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_share_of_the_samples_becomes_the_validation_split(tmp_path):
    pattern = shard_writer(tmp_path / "data", 60)
    index(pattern, tmp_path / "out", val_fraction=0.2)
    index(f"{tmp_path}/data/t-000[543210].tar", tmp_path / "again", val_fraction=0.2, workers=2)
    assert sums(tmp_path / "out") == sums(tmp_path / "again")
    parts = {split: {row["key"] for row in read_rows(tmp_path / "out", split)} for split in ("train", "val")}
    assert not parts["train"] & parts["val"] and len(parts["train"] | parts["val"]) == 60
    assert 4 <= len(parts["val"]) <= 20
    assert open_dataset(tmp_path / "out", "val").label.tolist()


# ---- interruptions and storage ---------------------------------------------------------------------------


def test_parts_and_interruptions_give_the_same_catalogue(tmp_path, capsys):
    pattern = shard_writer(tmp_path / "data", 70)
    png = [("p.png", encoded(pixels(8), "PNG")), ("p.cls", b"1")]
    write_tar(tmp_path / "data/t-0007.tar", png)
    pattern = pattern.replace("0006", "0007")
    options = {"repack": True, "val_fraction": 0.2}
    assert index(pattern, tmp_path / "out", **options) == 0
    for part in ("2/3", "1/3", "3/3"):
        index(pattern, tmp_path / "parts", shard_range=part, **options)
        assert not (tmp_path / "parts/dataset.json").exists()
    assert index(pattern, tmp_path / "parts", **options) == 0
    words = [
        "tars",
        "--train",
        pattern,
        "--out",
        str(tmp_path / "killed"),
        "--repack",
        "--val-fraction",
        "0.2",
    ]
    process = subprocess.Popen(
        module("tools.pack", *words, "--workers", "1"), cwd=ROOT, stdout=subprocess.PIPE
    )
    while process.poll() is None and not [*(tmp_path / "killed/.packing").glob("*/*.parquet")]:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed/dataset.json").exists()
    assert index(pattern, tmp_path / "killed", **options) == 0
    assert sums(tmp_path / "out") == sums(tmp_path / "parts") == sums(tmp_path / "killed")
    capsys.readouterr()
    assert index(pattern, tmp_path / "out", **options) == 0
    assert "already describes these tars" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="was packed with repack True, not False; give another --out"):
        index(pattern, tmp_path / "out", val_fraction=0.2)


def test_a_read_that_fails_for_a_while_is_repeated(tmp_path, monkeypatch):
    pattern = shard_writer(tmp_path / "data", 30)
    index(pattern, tmp_path / "calm")
    failures = {"t-0001.tar": 3}
    whole = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        failures[name] = failures.get(name, 0) - 1
        if failures[name] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(descriptor, size, offset)

    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    monkeypatch.setattr(os, "pread", pread)
    assert index(pattern, tmp_path / "out") == 0
    assert sums(tmp_path / "out") == sums(tmp_path / "calm")
    failures["t-0001.tar"] = 1000
    assert index(pattern, tmp_path / "later") == 1 and not (tmp_path / "later/dataset.json").exists()
    failures["t-0001.tar"] = 0
    assert index(pattern, tmp_path / "later") == 0
    assert sums(tmp_path / "later") == sums(tmp_path / "calm")


# ---- hostile and unusual tars ----------------------------------------------------------------------------


def header(name: str, kind: bytes = tarfile.REGTYPE, **values) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in values.items():
        setattr(made, field, value)
    return made


GOOD = [("good/a.jpg", jpeg()), ("good/a.cls", b"0")]
LINKED = "a link or a device in the tar"
UNUSUAL: dict[str, tuple[list[Member], dict[str, str]]] = {
    "names that are paths": (
        [("../../evil.jpg", jpeg()), ("/etc/evil.jpg", jpeg()), ("a/../../evil.jpg", jpeg())],
        {"../../evil": "in place", "/etc/evil": "in place", "a/../../evil": "in place"},
    ),
    "nested folders": (
        [header("x", tarfile.DIRTYPE), ("x/y/z.b.jpg", jpeg())],
        {"x/y/z": NO_PICTURE},
    ),
    "hard link": (
        [("b.jpg", jpeg()), header("c.jpg", tarfile.LNKTYPE, linkname="b.jpg")],
        {"b": "in place", "c": LINKED},
    ),
    "symbolic link": ([header("c.jpg", tarfile.SYMTYPE, linkname="/etc/passwd")], {"c": LINKED}),
    "device and pipe": (
        [header("c.jpg", tarfile.CHRTYPE, devmajor=1), header("d.jpg", tarfile.FIFOTYPE)],
        {"c": LINKED, "d": LINKED},
    ),
    "two files of one name": (
        [("b.jpg", jpeg()), ("b.jpg", jpeg()), ("c.jpg", jpeg())],
        {"b": "two files of one name", "c": "in place"},
    ),
    "one key twice": (
        [("b.jpg", jpeg()), ("c.jpg", jpeg()), ("b.txt", b"a")],
        {"c": "in place", "b": NO_PICTURE},
    ),
    "fields of webdataset": (
        [("b.__key__", b"x"), ("b.__bad__", b"x"), ("b.jpg", jpeg()), ("__m__/b.jpg", b"")],
        {"b": "in place"},
    ),
    "long name": ([(f"{'n' * 300}/{'m' * 200}.jpg", jpeg())], {f"{'n' * 300}/{'m' * 200}": "in place"}),
    "other characters": (
        [("übung/猫.jpg", jpeg()), ("\udcff.jpg", jpeg())],
        {"übung/猫": "in place", "?": "in place"},
    ),
    "no extension": ([("README", b"x"), (".hidden.jpg", b"x")], {}),
}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_members_give_a_row_or_a_reason(case, kind, tmp_path):
    members, expected = UNUSUAL[case]
    tar = write_tar(tmp_path / "deep/er/a.tar", [*members, *GOOD], format=kind)
    before = {*tmp_path.rglob("*")}
    index(tar, tmp_path / "deep/out", unlabelled=True)
    assert outcomes(tmp_path / "deep/out") == {**expected, "good/a": "in place"}
    assert verify(tmp_path / "deep/out") == 0
    stage(str(tmp_path / "deep/out"), tmp_path / "deep/copy")
    new = {path.relative_to(tmp_path).as_posix() for path in {*tmp_path.rglob("*")} - before}
    assert all(path.startswith(("deep/out", "deep/copy")) for path in new)


def sized(size: int) -> bytes:
    """A tar whose second member has another size in its header, with a correct checksum."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.jpg", "b.jpg"):
            made = header(name, size=len(jpeg()))
            tar.addfile(made, io.BytesIO(jpeg()))
    data = bytearray(buffer.getvalue())
    start = data.index(b"b.jpg")
    data[start + 124 : start + 136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    total = sum(data[start : start + 148]) + 8 * 32 + sum(data[start + 156 : start + 512])
    data[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(data)


def sparse() -> bytes:
    """A tar with a sparse member of GNU tar's format 1.0."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        made = header("b.jpg", size=512 + len(jpeg()))
        made.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "b.jpg",
            "GNU.sparse.realsize": "9999",
        }
        tar.addfile(made, io.BytesIO(b"1\n0\n9\n".ljust(512, b"\0") + jpeg()))
    return buffer.getvalue()


def long_header(length: int) -> bytes:
    made = header("x", tarfile.XHDTYPE, size=length)
    return made.tobuf(tarfile.GNU_FORMAT)


def half() -> bytes:
    """A tar that ends before the picture of its first sample, whose class comes first."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(header("a.cls", size=1), io.BytesIO(b"0"))
    return buffer.getvalue()[:1024]


ENDS = ("from here on the tar is damaged", "from here on the tar is cut off")
BAD_START = {"byte 0": "not a tar, or damaged at its start"}
HOSTILE: dict[str, tuple[Callable[[], bytes], dict[str, str]]] = {
    "8 GB": (lambda: sized(8**11 - 1), {"a": "in place", "b": "cut off with the tar", "byte": ENDS[1]}),
    "2 to the 80": (lambda: sized(1 << 80), {"a": "in place", "b": "cut off with the tar", "byte": ENDS[1]}),
    "negative": (lambda: sized(-512), {"a": "in place", "byte": ENDS[0]}),
    "slightly negative": (lambda: sized(-1), {"a": "in place", "byte": ENDS[0]}),
    "very negative": (lambda: sized(-(1 << 70)), {"a": "in place", "byte": ENDS[0]}),
    "sparse": (sparse, {"b": "a sparse file in the tar"}),
    "long header": (lambda: long_header(1 << 40), BAD_START),
    "negative header": (lambda: long_header(-512), BAD_START),
    "chain of headers": (lambda: long_header(0) * 5000, BAD_START),
    "text": (lambda: b"no tar" * 999, BAD_START),
    "nothing": (lambda: b"", BAD_START),
    "zeros": (lambda: bytes(10240), {}),
    "first sample cut off": (half, {"a": CUT_OFF, "byte": ENDS[1]}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tars_give_a_row_or_a_reason(case, tmp_path):
    make, expected = HOSTILE[case]
    good = write_tar(tmp_path / "good.tar", GOOD)
    (tmp_path / "bad.tar").write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index(f"{good}::{tmp_path / 'bad.tar'}", tmp_path / "out", unlabelled=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    found = {
        key if key == "byte 0" else key.partition(" ")[0]: what
        for key, what in outcomes(tmp_path / "out").items()
    }
    assert found == {**expected, "good/a": "in place"}
    assert verify(tmp_path / "out") == 0


def test_a_tar_that_is_cut_off_anywhere_keeps_the_samples_before(tmp_path):
    shard_writer(tmp_path / "data", 6)
    data = (tmp_path / "data/t-0000.tar").read_bytes()
    good = write_tar(tmp_path / "good.tar", GOOD)
    counts = []
    for place in [*range(1, len(data), 1777), len(data) - 5000]:
        (tmp_path / "cut.tar").write_bytes(data[:place])
        root = tmp_path / str(place)
        index(f"{good}::{tmp_path / 'cut.tar'}", root, unlabelled=True)
        rows = [row for row in read_rows(root) if "cut.tar" in row["source"]]
        reasons = {row["reason"] for row in rows} - {""}
        counts.append(sum(row["status"] == "ok" for row in rows))
        marked = data[:place].endswith(bytes(512)) and place > len(data) - 8000
        assert marked or reasons & {*ENDS, *BAD_START.values()}, place
        assert verify(root) == 0
    assert counts == sorted(counts) and counts[-1] == 6 and counts[0] == 0


def test_damaged_headers_never_lose_samples_in_silence(tmp_path):
    shard_writer(tmp_path / "data", 6)
    data = (tmp_path / "data/t-0000.tar").read_bytes()
    with tarfile.open(tmp_path / "data/t-0000.tar") as tar:
        places = [member.offset for member in tar]
    for place in places:
        damaged = bytearray(data)
        damaged[place + 3] ^= 0x40
        (tmp_path / "damaged.tar").write_bytes(damaged)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        good = write_tar(tmp_path / "good.tar", GOOD)
        index(f"{good}::{tmp_path / 'damaged.tar'}", tmp_path / "out", unlabelled=True)
        assert {*ENDS, *BAD_START.values()} & {*outcomes(tmp_path / "out").values()}


def test_a_damaged_tar_ends_with_exit_code_1_and_its_name(tmp_path, capsys):
    """It was one rejected row, so that a lost half of a dataset could end with exit code 0."""
    pattern = shard_writer(tmp_path / "data", 120, per_tar=60)
    tar = tmp_path / "data/t-0001.tar"
    data = tar.read_bytes()
    with tarfile.open(tar) as whole:
        places = {member.name: member.offset for member in whole}
    assert [*places][:2] == ["n/00060.cls", "n/00060.jpg"]  # the class is first
    tar.write_bytes(data[: places["n/00110.jpg"]])  # the last sample has a class and no picture
    assert index(pattern, max_reject=0.001) == 1
    at = places["n/00110.jpg"]
    expected = (
        f"an unknown number of samples is lost, because these tars are damaged: t-0001.tar from byte {at} on "
        "(50 samples before it are used); restore them and index all tars into another folder (--out, with "
        "make: OUT=), or accept the loss with --max-reject 1 (with make: in ARGS=)."
    )
    out = capsys.readouterr().out
    assert expected in out.splitlines() and "samples were rejected" not in out  # one advice, not two
    found = outcomes(tmp_path / "data")
    assert found["n/00110"] == CUT_OFF and NO_PICTURE not in found.values()
    assert len(open_dataset(tmp_path / "data", "train")) == 110  # the result is written
    assert index(pattern, max_reject=0.5) == 1  # the same command does not hide it
    assert expected in capsys.readouterr().out.splitlines()
    assert index(pattern, max_reject=1.0) == 0
    assert "t-0001.tar from byte" in capsys.readouterr().out


def test_the_name_of_another_field_is_no_class(tmp_path):
    """A sample without the named field had the class that `class_name` gives for the usual fields."""
    fields = [{"breed": 0, "class_name": "dog"}, {"breed": 1, "class_name": "dog"}, {"class_name": "dog"}]
    members: list[Member] = []
    for number, values in enumerate(fields):
        files = {"jpg": encoded(pixels(number)), "json": json.dumps(values).encode()}
        members += [(f"{number}.{suffix}", data) for suffix, data in files.items()]
    tar = write_tar(tmp_path / "a.tar", members)
    assert index(tar, tmp_path / "data", class_key="breed") == 0
    assert read_info(tmp_path / "data").classes == ("0", "1")
    assert outcomes(tmp_path / "data")["2"] == NO_CLASS
    for key in ("json", ".JPG"):
        with pytest.raises(UserError, match="is no class; give another suffix"):
            index(tar, tmp_path / "other", class_key=key)


def test_classes_that_are_not_read_are_named(tmp_path, capsys):
    """The table gave only "the samples have no classes"."""
    members: list[Member] = []
    for number in range(4):
        fields = json.dumps({"target": number % 2, "Source": "web"}).encode()
        files = {"jpg": encoded(pixels(number)), "label": b"ab"[number % 2 :][:1], "json": fields}
        members += [(f"{number}.{suffix}", data) for suffix, data in files.items()]
    tar = write_tar(tmp_path / "a.tar", members)
    assert index(tar, tmp_path / "none") == 0
    out = " ".join(capsys.readouterr().out.split())
    other = ".label (4), field target of .json, field Source of .json"
    assert f"no sample has a class; a.tar also has {other}; if one is the class, give --class-key" in out
    with pytest.raises(UserError, match="was packed with another --class-key; give another --out"):
        index(tar, tmp_path / "none", class_key="label")
    assert index(tar, tmp_path / "suffix", class_key="label") == 0
    assert read_info(tmp_path / "suffix").classes == ("a", "b")
    assert index(tar, tmp_path / "field", class_key="target") == 0
    assert read_info(tmp_path / "field").classes == ("0", "1")
    for name in ("suffix", "field"):
        assert verify(tmp_path / name) == 0
        assert open_dataset(tmp_path / name, "train").label.tolist() == [0, 1, 0, 1]
    assert "no sample has a class" not in capsys.readouterr().out


def test_the_files_that_indexing_wrote_are_no_tars(tmp_path, capsys):
    """DIR/* named dataset.json as a tar when the command was repeated."""
    shard_writer(tmp_path, 12)
    write_tar(tmp_path / "t-0009.tar", [("p.png", encoded(pixels(8), "PNG")), ("p.cls", b"1")])
    for pattern in ("*", "**/*"):
        assert index(f"{tmp_path}/{pattern}", repack=True) == 0
    out = capsys.readouterr().out
    assert "already describes these tars" in out
    assert re.search(r"\*: \d other files are left out, such as \S+/dataset\.json\n", out)


def test_brackets_in_the_names_of_folders_are_no_patterns(tmp_path):
    tars = [write_tar(tmp_path / "set [v2]" / f"t-{n}.tar", GOOD) for n in range(2)]
    for pattern in ("set [v2]/t-{0..1}.tar", "set [v2]/*.tar", "*/t-[01].tar"):
        assert expand(f"{tmp_path}/{pattern}", "--train") == tars


def test_keys_with_dots_are_explained(tmp_path):
    """The reason was that the sample has no picture."""
    dotted = [("a.v1.jpg", jpeg()), ("a.v1.cls", b"0")]
    with pytest.raises(UserError, match=r"that no key has a dot, .* ends a key at its first dot"):
        index(write_tar(tmp_path / "a.tar", dotted), tmp_path / "out")
    index(write_tar(tmp_path / "b.tar", [*GOOD, *dotted]), tmp_path / "out", unlabelled=True)
    assert outcomes(tmp_path / "out")["a"] == NO_PICTURE


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "gzip": (lambda root: write_gz(root / "a.tar.gz"), r"a\.tar\.gz is compressed \(gzip\).*; unpack it"),
    "gzip without a suffix": (lambda root: write_gz(root / "a.tar"), r"is compressed \(gzip\)"),
    "missing": (lambda root: f"{root}/t-{{00..01}}.tar", r"t-00\.tar cannot be read: No such file"),
    "folder": (lambda root: str(root), "cannot be read: not a regular file"),
    "device": (lambda root: "/dev/zero", "/dev/zero cannot be read: not a regular file"),
    "pipe": (
        lambda root: os.mkfifo(root / "p.tar") or str(root / "p.tar"),
        "cannot be read: not a regular file",
    ),
    "command": (lambda root: f"pipe:touch {root}/evil", "is not a file; copy the tars"),
    "web": (lambda root: "https://host/{0..3}.tar", "is not a file; copy the tars"),
    "glob": (lambda root: f"{root}/*.tgz", "names no file"),
    "variable": (lambda root: "${NAME}.tar", "cannot be expanded"),
    "twice": (lambda root: "::".join([str(labelled(root / "a.tar", "0"))] * 2), "name .*a.tar twice"),
    "without pictures": (
        lambda root: str(write_tar(root / "a.tar", [("a.txt", b"x")])),
        r"contains KEY\.jpg",
    ),
}


def write_gz(path: Path) -> str:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(header("a.jpg"))
    return str(path)


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_list_of_tars_ends_with_one_line(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        index(make(tmp_path), tmp_path / "out")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out").exists()


def test_dataset_json_cannot_point_at_devices(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.stage.time.sleep", lambda _: None)
    index(shard_writer(tmp_path / "data", 12), tmp_path / "out")
    info = json.loads((tmp_path / "out/dataset.json").read_text())
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path), "x" * 5000):
        hostile = info | {"tars": {"train": [info["tars"]["train"][0], path], "val": []}}
        (tmp_path / "out/dataset.json").write_text(json.dumps(hostile))
        with pytest.raises(UserError, match="is missing"):
            check_shards(read_info(tmp_path / "out"))
        with contextlib.suppress(UserError):  # for one that does not exist; the others count as damaged
            assert not len(open_dataset(tmp_path / "out", "train").read(np.array([11]), np.array([[0]]))[0])
        with pytest.raises(UserError, match=r"is not a file|File name too long"):
            stage(str(tmp_path / "out"), tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
    for tars in (
        {"train": "ab", "val": []},
        {"train": ["a"], "val": []},
        {"train": [1, 2], "val": []},
        {"train": info["tars"]["train"]},
        {"train": ["a\0", "b"], "val": []},
        {"train": ["\udcff", "b"], "val": []},
    ):
        (tmp_path / "out/dataset.json").write_text(json.dumps(info | {"tars": tars}))
        with pytest.raises(UserError, match=r"dataset\.json is damaged"):
            read_info(tmp_path / "out")


def test_a_finished_index_is_kept_with_other_versions_of_libraries(tmp_path, capsys):
    pattern = shard_writer(tmp_path / "data", 12)
    index(pattern)
    path = tmp_path / "data/dataset.json"
    info = json.loads(path.read_text())
    info["packing"] |= {"pillow": "1.0", "torch": "1.0"}
    path.write_text(json.dumps(info))
    assert index(pattern) == 0
    assert "already describes these tars" in capsys.readouterr().out


def test_a_tar_that_is_named_in_two_ways_is_not_in_two_splits(tmp_path):
    shard_writer(tmp_path / "data", 12)
    (tmp_path / "link.tar").symlink_to(tmp_path / "data/t-0000.tar")
    with pytest.raises(UserError, match=r"t-0000\.tar twice; name each tar once"):
        index(tmp_path / "data/t-0000.tar", val=tmp_path / "link.tar")


def test_another_dataset_in_the_folder_is_kept(tmp_path):
    pattern = shard_writer(tmp_path / "data", 12)
    (tmp_path / "data/dataset.json").write_text('{"name": "mine"}')
    with pytest.raises(
        UserError, match=r"dataset\.json is not of a packed dataset, or damaged; give another --out"
    ):
        index(pattern)
    assert (tmp_path / "data/dataset.json").read_text() == '{"name": "mine"}'
