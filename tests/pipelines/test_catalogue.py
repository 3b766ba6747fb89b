"""The catalogue of a packed dataset, and the messages for broken datasets."""

import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import dataset as dataset_module
from pipelines.dataset import SCHEMA, Dataset, open_dataset, read_info
from pipelines.errors import UserError
from tests.pipelines_fixtures import (
    clip_dataset,
    frame_bytes,
    image_dataset,
    jpeg,
    keys_of,
    picture,
    read_rows,
    write_dataset,
    write_info,
    write_rows,
)
from tools.format3 import convert


def test_the_catalogue_locates_rows_and_bytes(tmp_path):
    clips = [[jpeg(picture(32, 24, 10 * clip + k)) for k in range(clip + 1)] for clip in range(5)]
    root = write_dataset(tmp_path / "d", clips, "video", per_shard=2)
    catalogue = open_dataset(root, "train")
    assert len(catalogue) == 5 and catalogue.info.classes == ("c0", "c1", "c2")
    assert catalogue.shard.tolist() == [0, 0, 1, 1, 2]
    assert catalogue.label.tolist() == [0, 1, 2, 0, 1]
    assert catalogue.frame_counts(np.arange(5)).tolist() == [1, 2, 3, 4, 5]
    assert keys_of(catalogue) == [f"{i:08d}-x" for i in range(5)]
    for sample, frames in enumerate(clips):
        for number, frame in enumerate(frames):
            assert frame_bytes(catalogue, sample, number).tobytes() == frame


def test_rejected_rows_are_not_samples(tmp_path):
    root = image_dataset(tmp_path / "d", count=6)
    rows = read_rows(root)
    rows[2] |= {"status": "rejected", "reason": "truncated", "shard": -1, "frames": 0}
    rows[2] |= {"offsets": [], "sizes": [], "crcs": []}
    write_rows(root, rows)
    info = json.loads((root / "dataset.json").read_text())
    info["splits"]["train"] |= {"samples": 5, "rejected": 1}
    (root / "dataset.json").write_text(json.dumps(info))
    catalogue = open_dataset(root, "train")
    assert keys_of(catalogue) == [f"{i:08d}-x" for i in (0, 1, 3, 4, 5)]
    assert frame_bytes(catalogue, 2, 0).tobytes() == jpeg(picture(96, 72, 3))


def test_a_dataset_may_have_more_tars_than_open_files_are_allowed(tmp_path):
    import resource

    pictures = [[jpeg(picture(96, 72, seed))] for seed in range(60)]
    catalogue = open_dataset(write_dataset(tmp_path / "d", pictures, "image", per_shard=1), "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list((tmp_path / "/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * used, hard))
        for _ in range(2):
            assert all(frame_bytes(catalogue, n, 0).tobytes() == pictures[n][0] for n in range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_broken_dataset_has_its_message(tmp_path):
    def expect(root, match, split="train"):
        with pytest.raises(UserError, match=match) as caught:
            open_dataset(root, split)
        assert "\n" not in str(caught.value)

    expect(tmp_path / "absent", "absent does not exist")
    (tmp_path / "empty").mkdir()
    expect(tmp_path / "empty", "no dataset.json")
    root = clip_dataset(tmp_path / "d", [3, 4])
    expect(root, "no split 'test', only train", split="test")

    whole = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(whole[:40])
    expect(root, "dataset.json is damaged")
    (root / "dataset.json").write_text("[]")
    expect(root, "dataset.json is damaged")
    without = {name: value for name, value in json.loads(whole).items() if name != "catalogue_sha256"}
    (root / "dataset.json").write_text(json.dumps(without | {"splits": {}}))
    expect(root, "dataset.json is damaged")
    (root / "dataset.json").write_text(whole.replace('"format": 3', '"format": 1'))
    expect(root, "has format 1, this version reads 3; pack it again")
    (root / "dataset.json").write_text(whole.replace('"format": 3', '"format": 2'))
    expect(root, "has format 2, this version reads 3; convert it with `python -m tools.format3 /.*/d`")
    (root / "dataset.json").write_text(whole.replace('"samples": 2', '"samples": 3'))
    expect(root, "has 2 rows, but dataset.json has 3")
    (root / "dataset.json").write_text(
        whole.replace('"samples": 2, "rejected": 0', '"samples": 1, "rejected": 1')
    )
    expect(root, "its packed samples are not its first 1 rows")
    (root / "dataset.json").write_text(whole)

    rows = (root / "train.arrow").read_bytes()
    (root / "train.arrow").write_bytes(rows[: len(rows) // 2])
    expect(root, "train.arrow cannot be read")
    (root / "train.arrow").unlink()
    expect(root, "train.arrow is missing")


def test_the_message_names_a_missing_tar(tmp_path):
    root = image_dataset(tmp_path / "d", count=3)
    (root / "train" / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"000000\.tar cannot be opened"):
        frame_bytes(open_dataset(root, "train"), 0, 0)


def test_read_info_returns_the_packed_facts(tmp_path):
    info = read_info(image_dataset(tmp_path / "d", count=3))
    assert info.kind == "image" and info.splits["train"]["samples"] == 3


def opened(root):
    """The arrays of a catalogue by name."""
    dataset = open_dataset(root, "train")
    return {field.name: getattr(dataset, field.name) for field in fields(Dataset)[2:]}


def test_a_mapped_catalogue_has_the_same_numbers(tmp_path, monkeypatch):
    root = clip_dataset(tmp_path / "d", [3, 9, 4])
    small = opened(root)
    monkeypatch.setattr(dataset_module, "MAPPED", 1)
    large = opened(root)
    for name, column in small.items():
        assert np.array_equal(column, large[name]) and not large[name].flags.writeable, name
    assert sorted(path.name for path in root.iterdir()) == ["dataset.json", "train", "train.arrow"]


def test_processes_share_the_memory_of_a_large_catalogue(tmp_path):
    """The arrays are mapped from the file, so reading them adds little to a process's private memory."""
    root = many(tmp_path / "d")
    code = (
        "import sys; from pathlib import Path; from pipelines import dataset; dataset.MAPPED = 1\n"
        "def own(): return next(int(l.split()[1]) for l in open('/proc/self/status') if 'RssAnon' in l)\n"
        "before = own(); d = dataset.open_dataset(Path(sys.argv[1]), 'train')\n"
        "assert d.offset.sum() > 0 and d.crc.sum() == 0; print(own() - before, len(d.offset))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, root], capture_output=True, text=True, check=True
    ).stdout
    grown, frames = map(int, printed.split())
    assert frames == 2_000_000 and grown < 8_000  # KiB; the numbers are 32 MB


def many(root):
    """A catalogue of 2,000 clips of 1,000 frames, without tars."""
    root.mkdir()
    row = {
        "key": "k",
        "label": 0,
        "class_name": "c0",
        "source": "s",
        "status": "ok",
        "reason": "",
        "change": "",
    }
    row |= {"width": 8, "height": 8, "frames": 1000, "shard": 0, "sha256": ""}
    row |= {"offsets": list(range(512, 1512)), "sizes": [1] * 1000, "crcs": [0] * 1000}
    write_rows(root, [row] * 2000)
    write_info(root, "video", {"train": {"samples": 2000, "rejected": 0, "frames": 2_000_000, "shards": 0}})
    info = json.loads((root / "dataset.json").read_text())
    info["splits"]["train"]["shards"], info["tar_bytes"]["train"] = 1, [1 << 20]
    (root / "dataset.json").write_text(json.dumps(info))
    return root


def test_a_dataset_of_format_2_is_converted_and_keeps_its_ids(tmp_path, capsys):
    root = clip_dataset(tmp_path / "d", [3, 9, 4])
    rows, before = read_rows(root), opened(root)
    rejected = rows[0] | {
        "status": "rejected",
        "shard": -1,
        "frames": 0,
        "offsets": [],
        "sizes": [],
        "crcs": [],
    }
    old = pa.schema([(f.name, older(f.type)) for f in SCHEMA])
    pq.write_table(pa.Table.from_pylist([rows[0], rejected, *rows[1:]], old), root / "train.parquet")
    info = json.loads((root / "dataset.json").read_text())
    info["format"], info["splits"]["train"]["rejected"] = 2, 1
    del info["catalogue_sha256"]
    (root / "dataset.json").write_text(json.dumps(info))
    (root / "train.arrow").unlink()
    with pytest.raises(UserError, match=r"convert it with `python -m tools\.format3"):
        open_dataset(root, "train")
    convert(root)
    after = opened(root)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "train.arrow: 3 samples" in capsys.readouterr().out and not (root / "train.parquet").exists()
    with pytest.raises(UserError, match="has format 3; only format 2 can be converted"):
        convert(root)


def older(kind: pa.DataType) -> pa.DataType:
    """The type of a column in format 2."""
    if pa.types.is_large_list(kind):
        return pa.list_(kind.value_type)
    return pa.string() if pa.types.is_large_string(kind) else kind


def test_a_damaged_dataset_of_format_2_is_not_converted_and_stays_as_it_is(tmp_path):
    root = clip_dataset(tmp_path / "d", [3, 9])
    old = pa.schema([(f.name, older(f.type)) for f in SCHEMA])
    pq.write_table(pa.Table.from_pylist(read_rows(root), old), root / "train.parquet")
    info = json.loads((root / "dataset.json").read_text()) | {"format": 2}
    for change, message in (
        ({"catalogue_sha256": {"train": "0" * 64}}, "checksum of train.parquet is not the one in"),
        ({"catalogue_sha256": {}, "splits": {"../x": info["splits"]["train"]}}, "cannot be converted"),
        ({"catalogue_sha256": {}, "classes": info["classes"][:1]}, "cannot be read"),
    ):
        text = json.dumps(info | change)
        (root / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=message):
            convert(root)
        assert (root / "dataset.json").read_text() == text and (root / "train.parquet").exists()
