"""Malicious files: nothing is unpacked, nothing is written outside, impossible values are refused."""

import json
import os
import resource
import struct
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines import dataset
from pipelines.config import DataConfig
from pipelines.dataset import SCHEMA, check_shards, open_dataset, read_info
from pipelines.errors import UserError
from tests.pipelines_fixtures import (
    clip_dataset,
    evaluation,
    image_dataset,
    jpeg,
    picture,
    read_rows,
    train,
    write_rows,
)
from tools import stage
from tools.images import BadImage, prepare
from tools.verify import verify

SIDE = 50_000  # pixels; a square picture in color would take 7.5 GB


def tree(top: Path) -> set[str]:
    return {path.relative_to(top).as_posix() for path in top.rglob("*")}


def use(root: Path) -> None:
    """Train, evaluate and verify."""
    catalogue = open_dataset(root, "train")
    train(catalogue, DataConfig(size=32, max_bad=0.2), 2)
    evaluation(catalogue, DataConfig(size=32), 8)
    verify(root)


def change(root: Path, index: int = 0, **values) -> None:
    """Change values in a row of the catalogue."""
    rows = read_rows(root)
    rows[index].update(values)
    write_rows(root, rows)


def change_info(root: Path, **values) -> None:
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(info | values))


@pytest.mark.fault
def test_tars_have_members_outside_the_folder(tmp_path):
    """Members named ../x and /x, links and devices have no effect: no shard is ever unpacked."""
    root = image_dataset(tmp_path / "deep" / "images", count=4)
    link, device = tarfile.TarInfo("00000000-x.json"), tarfile.TarInfo("00000000-x.cls")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
    names = ("../../evil", "../00000001-x.jpg", f"{tmp_path}/evil", "00000000-x.jpg/../../evil")
    hostile = [link, device, *(tarfile.TarInfo(name) for name in names)]
    offsets = []
    with tarfile.open(root / "train/000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(4):  # the frames are at the catalogue's offsets, with hostile names
            for member in hostile:
                tar.addfile(member)
            frame = jpeg(picture(96, 72, number))
            member = tarfile.TarInfo(names[number])
            member.size = len(frame)
            offsets.append(tar.offset + 512)
            tar.addfile(member, BytesIO(frame))
    for number, offset in enumerate(offsets):
        change(root, number, offsets=[offset], sha256="0" * 64, source="../../etc/passwd", key="../../evil")
    change_info(root, tar_bytes={"train": [(root / "train/000000.tar").stat().st_size]})
    before = tree(tmp_path)
    use(root)
    assert verify(root) == 1  # it reports that this is not a shard of this project
    assert tree(tmp_path) == before
    (root / "train/000000.idx").touch()
    with pytest.raises(UserError, match="checksum"):
        stage.stage(str(root), tmp_path / "deep" / "copy")
    assert not any("evil" in name for name in tree(tmp_path)) and not Path("/evil").exists()


@pytest.mark.fault
def test_a_shard_is_a_pipe(tmp_path):
    """It is refused; reading it would block."""
    root = image_dataset(tmp_path / "images", count=20)
    (root / "train/000001.tar").unlink()
    os.mkfifo(root / "train/000001.tar")
    with pytest.raises(UserError, match=r"000001\.tar is missing"):
        check_shards(read_info(root))
    train(open_dataset(root, "train"), DataConfig(size=32, max_bad=0.5), 3)


def png_bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(200 * (3 * SIDE + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def claiming(data: bytes, width: int = SIDE, height: int = SIDE) -> bytes:
    """A JPEG with another size in its header."""
    start = next(data.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data) + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def webp_bomb() -> bytes:
    buffer = BytesIO()
    small = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    small[0].save(buffer, "WEBP", save_all=True, append_images=small[1:])
    data = bytearray(buffer.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = 2 * struct.pack("<I", SIDE - 1)[:3]
    return bytes(data)


def gif_bomb() -> bytes:
    size = struct.pack("<HH", SIDE, SIDE)
    return b"GIF89a" + size + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + size + b"\0\x02\x02\x4c\x01\0;"


def progressive() -> bytes:
    buffer = BytesIO()
    Image.fromarray(picture(96, 72, 0)).save(buffer, "JPEG", progressive=True)
    return buffer.getvalue()


BOMBS = {
    "png": png_bomb,
    "jpeg": lambda: claiming(jpeg(picture(96, 72, 0))),
    "progressive jpeg": lambda: claiming(progressive()),
    "webp": webp_bomb,
    "gif": gif_bomb,
}


@pytest.mark.fault
@pytest.mark.parametrize("kind", BOMBS)
def test_a_source_is_a_decompression_bomb(kind):
    """A picture whose header says 50,000 x 50,000 pixels is rejected before memory is allocated."""
    data = BOMBS[kind]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match=r"more than --max-pixels|cut off, damaged or of a kind"):
        prepare(data, 256, 100_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.fault
@pytest.mark.parametrize("size", [(SIDE, SIDE), (65_535, 65_535), (0, 0), (1, 65_535)])
@pytest.mark.parametrize("in_catalogue", [False, True], ids=["", "as in the catalogue"])
def test_a_shard_has_a_decompression_bomb(tmp_path, size, in_catalogue):
    """A JPEG with an absurd header and a correct checksum ends training; the message names it."""
    root = image_dataset(tmp_path / "images", count=12)
    row = read_rows(root)[5]
    bomb = claiming(jpeg(picture(96, 72, 5)), *size)
    with (root / "train/000000.tar").open("r+b") as tar:
        tar.seek(row["offsets"][0])
        tar.write(bomb)
    sides = {"width": size[0], "height": size[1]} if in_catalogue else {}
    change(root, 5, crcs=[zlib.crc32(bomb)], **sides)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if in_catalogue and size != (1, 65_535):
        with pytest.raises(UserError, match="impossible widths or heights"):
            open_dataset(root, "train")
        return
    with pytest.raises(UserError, match=r"00000005-x\.jpg at byte \d+ does not decode, although its"):
        train(open_dataset(root, "train"), DataConfig(size=32), 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KiB


INT32, INT64 = 2**31 - 1, 2**63 - 1
ABSURD = {
    "label": (-2, 3, INT32, -INT32 - 1),
    "width": (0, -1, 65_536, INT32),
    "height": (0, -1, 65_536, INT32),
    "frames": (0, -1, 2, 4, INT32),
    "shard": (-1, 1, 1000, INT32, -INT32 - 1),
    "offsets": ([], [512], [-512] * 3, [0] * 3, [512, 512, INT64], [512, -INT64, 512], [1 << 40] * 3),
    "sizes": ([], [-1, 1, 1], [0, 1, 1], [INT32] * 3, [1, 1]),
    "crcs": ([], [1, 2]),
}


@pytest.mark.fault
@pytest.mark.parametrize("large", [False, True], ids=["read", "mapped"])
def test_a_catalogue_has_impossible_numbers(tmp_path, monkeypatch, large):
    """A frame outside its tar, a label without a class or a shard out of order is refused on opening."""
    root = clip_dataset(tmp_path / "clips", [3] * 3)
    whole = read_rows(root)
    monkeypatch.setattr(dataset, "MAPPED", 1 if large else 1 << 60)
    for name, values in ABSURD.items():
        for value in (*values, None):
            write_rows(root, whole)
            change(root, 1, **{name: value})
            with pytest.raises(UserError, match=r"train\.arrow cannot be read .*; pack this dataset again"):
                open_dataset(root, "train")
    for other in (SCHEMA.remove(3), SCHEMA.set(7, pa.field("width", pa.int64())), SCHEMA.append(SCHEMA[0])):
        write_rows(root, [], schema=other)
        with pytest.raises(UserError, match="its columns are not those of a catalogue"):
            open_dataset(root, "train")


COUNTS = {"samples": 2, "rejected": 0, "frames": 2, "shards": 1}
HOSTILE_INFO = {
    "kind": ("audio", None, [], 1),
    "classes": (None, "abc", [1, 2], ["a", "a"], {"a": 1}, ["\ud800"], [["a"]], [None]),
    "packing": (None, [1], "x"),
    "tar_bytes": (
        None,
        {},
        {"train": []},
        {"train": [-1]},
        {"train": ["1"]},
        {"train": [1.5]},
        {"train": None},
    ),
    "splits": (
        None,
        [],
        {"train": None},
        {"train": {}},
        *(
            {"train": COUNTS | {name: value}}
            for name in COUNTS
            for value in (-1, 1.5, "2", True, None, 2**64)
        ),
        {"train": COUNTS | {"shards": 2}},
        *({name: COUNTS} for name in ("../x", "/x", "", ".", "..", "a/b", "a\0", "a\n", "trän")),
    ),
}


@pytest.mark.fault
def test_dataset_json_has_hostile_values(tmp_path):
    """Names that are paths, and values of another type, are refused with one line."""
    root = image_dataset(tmp_path / "images", count=2)
    whole = (root / "dataset.json").read_text()
    for name, values in HOSTILE_INFO.items():
        for value in values:
            (root / "dataset.json").write_text(whole)
            tars = {split: [30720] for split in value} if name == "splits" and value else {}
            change_info(root, **{name: value}, **({"tar_bytes": tars} if tars else {}))
            with pytest.raises(UserError, match=r"dataset\.json is damaged .*; pack this dataset again"):
                read_info(root)
    for text in ("[" * 100_000, "{}", "null", "1" * 10_000, whole[:-1] + ', "kind": ', "\ud800"):
        (root / "dataset.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match=r"dataset\.json is damaged"):
            read_info(root)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", ".."])
def test_a_staged_source_is_hostile(tmp_path, name):
    """A split whose name is a path is refused, and nothing is written outside the target."""
    source = image_dataset(tmp_path / "source", count=2)
    change_info(source, splits={name: COUNTS}, tar_bytes={name: [30720]})
    before = tree(tmp_path)
    target = tmp_path / "deep" / "target"
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        stage.stage(str(source), target)
    assert {path for path in tree(tmp_path) - before if not path.startswith("deep/target/")} <= {
        "deep",
        "deep/target",
    }


def test_a_staged_catalogue_is_impossible(tmp_path, monkeypatch):
    monkeypatch.setattr(stage.time, "sleep", lambda _: None)
    source = image_dataset(tmp_path / "source", count=2)
    (source / "train/000000.idx").write_text("")
    change(source, sha256="none")
    with pytest.raises(UserError, match=r"tar could not be copied .*the checksum of sample .* differs"):
        stage.stage(str(source), tmp_path / "copy")
    change(source, sizes=[-5])
    with pytest.raises(UserError, match="frames outside their tars"):
        stage.stage(str(source), tmp_path / "other")
