"""What a packed dataset says of itself, and the sentence for every way in which it may be broken."""

import json
from multiprocessing import get_context

import numpy as np
import pyarrow.parquet as pq
import pytest
from pipelines_fixtures import clip_dataset, frame_bytes, image_dataset, jpeg, keys_of, picture, write_dataset

from pipelines import columns
from pipelines.dataset import SCHEMA, open_dataset, read_info
from pipelines.errors import UserError


def test_rows_and_bytes_are_found(tmp_path):
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


def test_rejected_rows_are_left_out(tmp_path):
    root = image_dataset(tmp_path / "d", count=6)
    table = pq.read_table(root / "train.parquet").to_pylist()
    table[2] |= {
        "status": "rejected",
        "reason": "truncated",
        "shard": -1,
        "offsets": [],
        "sizes": [],
        "crcs": [],
        "frames": 0,
    }
    pq.write_table(pq.read_table(root / "train.parquet").from_pylist(table, SCHEMA), root / "train.parquet")
    info = json.loads((root / "dataset.json").read_text())
    info["splits"]["train"] |= {"samples": 5, "rejected": 1}
    (root / "dataset.json").write_text(json.dumps(info))
    catalogue = open_dataset(root, "train")
    assert keys_of(catalogue) == [f"{i:08d}-x" for i in (0, 1, 3, 4, 5)]
    assert frame_bytes(catalogue, 2, 0).tobytes() == jpeg(picture(96, 72, 3))


def test_more_tars_than_open_files_are_allowed(tmp_path):
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


def test_each_broken_dataset_gets_its_sentence(tmp_path):
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
    (root / "dataset.json").write_text(whole.replace('"format": 2', '"format": 1'))
    expect(root, "format 1, this version reads 2")
    (root / "dataset.json").write_text(whole.replace('"samples": 2', '"samples": 3'))
    expect(root, "has 2 rows, dataset.json says 3")
    (root / "dataset.json").write_text(
        whole.replace('"samples": 2, "rejected": 0', '"samples": 1, "rejected": 1')
    )
    expect(root, "has 2 samples, dataset.json says 1")
    (root / "dataset.json").write_text(whole)

    rows = (root / "train.parquet").read_bytes()
    (root / "train.parquet").write_bytes(rows[: len(rows) // 2])
    expect(root, "train.parquet cannot be read")
    (root / "train.parquet").unlink()
    expect(root, "train.parquet is missing")


def test_a_missing_tar_is_named(tmp_path):
    root = image_dataset(tmp_path / "d", count=3)
    (root / "train" / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"000000\.tar cannot be opened"):
        frame_bytes(open_dataset(root, "train"), 0, 0)


def test_read_info_reads_what_packing_wrote(tmp_path):
    info = read_info(image_dataset(tmp_path / "d", count=3))
    assert info.kind == "image" and info.splits["train"]["samples"] == 3


def opened(root):
    """A catalogue's numbers by name."""
    catalogue = open_dataset(root, "train")
    return {name: np.array(getattr(catalogue, name)) for name in columns.TYPES}


def assert_equal(one, other):
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_large_catalogue_is_mapped_and_follows_its_parquet(tmp_path, monkeypatch):
    root = clip_dataset(tmp_path / "d", [3, 9, 4])
    small = opened(root)
    monkeypatch.setattr(columns, "LARGE", 1)
    assert_equal(small, opened(root))
    (folder,) = root.glob(".train.*.columns")
    made = folder.stat().st_mtime_ns
    assert_equal(small, opened(root))
    assert folder.stat().st_mtime_ns == made

    rows = pq.read_table(root / "train.parquet").to_pylist()
    rows[1]["label"] = 0
    pq.write_table(pq.read_table(root / "train.parquet").from_pylist(rows, SCHEMA), root / "train.parquet")
    assert opened(root)["label"].tolist() == [0, 0, 2]
    assert len(list(root.glob(".train.*.columns"))) == 1 and not folder.exists()


def test_a_large_catalogue_on_a_disk_that_cannot_be_written_is_mapped_from_elsewhere(tmp_path, monkeypatch):
    root = clip_dataset(tmp_path / "d", [3, 9, 4])
    small = opened(root)
    monkeypatch.setattr(columns, "LARGE", 1)
    monkeypatch.setattr(columns.tempfile, "tempdir", str(tmp_path))
    (root / ".train.lock").mkdir()  # what makes writing beside the Parquet fail, also for root
    assert_equal(small, opened(root))
    assert len(list(tmp_path.glob("hiera-train-*/*.columns"))) == 1


def opened_as_large(root):
    columns.LARGE = 1
    return opened(root)


def test_many_processes_may_be_the_first_to_open_a_large_catalogue(tmp_path):
    root = image_dataset(tmp_path / "d")
    small = opened(root)
    with get_context("forkserver").Pool(4) as pool:
        for found in pool.map(opened_as_large, [root] * 8, chunksize=1):
            assert_equal(small, found)
    assert len(list(root.glob(".*"))) == 2  # the columns and the lock, no leftovers
