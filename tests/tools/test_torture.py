"""Names, links, numbers and damage as in real folders: packed, verified, and read for an epoch."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import DataConfig
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from tests.pipelines_fixtures import train
from tests.tools.test_pack import encoded, hopeless, mangled, pack_images, peculiar, pixels, rows_of, write
from tools.pack import ClipOptions, pack_clips
from tools.verify import verify

NAMES = (
    "with spaces",
    "qu'o\"tes",
    "ünï-çödé 日本 🎈",
    "-dash",
    "a,b;c=d&e",
    "dots.in.it",
    "per%cent $HOME `x`",
    "line\nbreak",
    "tab\there",
    "x" * 200,
    "é" * 100,
    os.fsdecode(b"latin-\xe9"),
)


def one_epoch(root: Path, view: DataConfig) -> None:
    """Every packed sample comes out of the training loader once, none of them damaged."""
    catalogue = open_dataset(root, "train")
    seen = train(catalogue, view, len(catalogue), batch=1)
    assert sorted(int(batch.ids[0]) for batch in seen) == list(range(len(catalogue)))
    assert sum(batch.bad for batch in seen) == 0


def test_any_name_and_link_is_packed(tmp_path):
    source = tmp_path / "source"
    for number, (folder, name) in enumerate(itertools.product(NAMES, NAMES)):
        write(source / folder / f"{name}.JPEG", encoded(pixels(number, (48, 40))))
    outside = tmp_path / "elsewhere"
    write(outside / "file.jpeg", encoded(pixels(999)))
    (source / NAMES[0] / "link to a file.jpg").symlink_to(outside / "file.jpeg")
    (source / "link to a folder").symlink_to(outside)
    (source / NAMES[1] / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (source / NAMES[2] / "endless").symlink_to(source)
    expected = len(NAMES) ** 2 + 3
    assert pack_images(source, tmp_path / "out", val_fraction=0.1, short_side=32) == 0
    rows = [row for split in ("train", "val") for row in rows_of(tmp_path / "out", split)]
    assert len(rows) == expected and len({row["source"] for row in rows}) == expected
    assert {row["source"]: row["reason"] for row in rows if row["status"] != "ok"} == {
        f"{NAMES[1]}/broken.jpg": "cannot be read: No such file or directory"
    }
    assert len(json.loads((tmp_path / "out/dataset.json").read_text())["classes"]) == len(NAMES) + 1
    assert verify(tmp_path / "out") == 0
    one_epoch(tmp_path / "out", DataConfig(size=16))


def test_every_kind_of_damage_is_listed(tmp_path):
    """Odd and hopeless files, truncations at every 5 %, flips all over, 200 files of random bytes."""
    random = np.random.default_rng(1)
    files = {name: data for name, (data, _) in {**peculiar(), **hopeless()}.items()} | mangled()
    whole = encoded(pixels(8))
    files |= {f"cut at {share}.jpg": whole[: len(whole) * share // 100] for share in range(0, 100, 5)}
    files |= {f"noise {n}.jpg": random.bytes(int(random.integers(1, 5000))) for n in range(200)}
    for name, data in files.items():
        write(tmp_path / "source" / name, data)
    code = pack_images(tmp_path / "source", tmp_path / "out", max_pixels=1_000_000, val_fraction=0.0)
    assert code == 1
    rows = rows_of(tmp_path / "out")
    assert sorted(row["source"] for row in rows) == sorted(files)
    status = {row["source"]: row["status"] for row in rows}
    assert {status[f"noise {n}.jpg"] for n in range(200)} == {"rejected"}
    assert {status[f"cut at {share}.jpg"] for share in range(0, 100, 5)} == {"rejected"}
    assert verify(tmp_path / "out") == 0
    one_epoch(tmp_path / "out", DataConfig(size=32))


def test_as_many_classes_as_kinetics_and_every_numbering_of_frames(tmp_path):
    """400 labels; frames zero-padded or not, from 0 or 1, with gaps, prefixes and other suffixes."""
    patterns = ("frame_%05d.jpg", "%d.jpeg", "img %d.JPG", "v2_f%03d.png", "%06d.JPEG", "f.%d.webp")
    labels = [f"label number {n}, 'quoted' ({n})" for n in range(400)]
    for split in ("train", "val"):
        lines = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for number, label in enumerate(labels if split == "train" else labels[:4]):
            lines.append(f'"{label}",{split}-{number},0,10,{split},0')
            folder = tmp_path / "frames" / label.replace(" ", "_") / f"{split}-{number}_000000_000010"
            pattern = patterns[number % len(patterns)]
            kind = {"png": "PNG", "webp": "WEBP"}.get(pattern.rsplit(".")[-1], "JPEG")
            numbers = (0, 1, 2) if number % 2 else (1, 9, 10)
            seed = 10 * number + (5 if split == "val" else 0)
            for place, frame in enumerate(numbers):
                write(folder / (pattern % frame), encoded(pixels(seed + place, (32, 24)), kind))
        write(tmp_path / f"annotations/{split}.csv", "\n".join([*lines, ""]).encode())
    out = tmp_path / "out"
    assert pack_clips(tmp_path / "annotations", out, ClipOptions(workers=2), frames=tmp_path / "frames") == 0
    assert json.loads((out / "dataset.json").read_text())["classes"] == sorted(labels)
    rows = rows_of(out)
    assert {row["class_name"]: row["label"] for row in rows} == {n: i for i, n in enumerate(sorted(labels))}
    assert {row["frames"] for row in rows} == {3} and len(rows) == 400
    assert verify(out) == 0
    one_epoch(out, DataConfig(size=16, frames=3, stride=1, scale=(1, 1)))


@pytest.mark.parametrize("workers", [2, 8])
def test_the_order_of_classes_is_checked_on_every_later_run(tmp_path, workers):
    """A class that appears or goes would move all those after it; that needs another dataset."""
    for name in ("b", "c"):
        write(tmp_path / "source" / name / "1.jpg", encoded(pixels(1)))
        write(tmp_path / "source" / name / "2.jpg", encoded(pixels(2)))
    assert pack_images(tmp_path / "source", tmp_path / "out", workers=workers) == 0
    write(tmp_path / "source/a/1.jpg", encoded(pixels(3)))
    with pytest.raises(UserError, match="another list of source files; give another --out"):
        pack_images(tmp_path / "source", tmp_path / "out", workers=workers)
