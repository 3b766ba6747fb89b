"""Packing from storage that fails temporarily: reads are repeated; the rest is packed by the next run."""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.test_pack import CLIPS, clip_tree, image_tree, pack_clips, pack_images, rows_of, sums
from tests.tools.test_pack_videos import pack_tree, tree
from tools import sources

Pack = Callable[..., int]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(sources.time, "sleep", slept.append)
    return slept


class Storage:
    """The OS's answer to reads of the paths that hold `word`: the first `failures` of each path fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, word: str, failures: float, number: int) -> None:
        self.word, self.failures, self.number = word, failures, number
        self.asked: Counter[str] = Counter()
        whole, part = Path.read_bytes, os.read

        def read_part(descriptor: int, size: int) -> bytes:
            self.check(Path(f"/proc/self/fd/{descriptor}").readlink())
            return part(descriptor, size)

        monkeypatch.setattr(Path, "read_bytes", lambda path: self.check(path) or whole(path))
        monkeypatch.setattr(os, "read", read_part)

    def check(self, path: Path) -> None:
        if self.word in str(path):
            self.asked[str(path)] += 1
            if self.asked[str(path)] <= self.failures:
                raise OSError(self.number, os.strerror(self.number), str(path))


def source_of(kind: str, root: Path) -> tuple[Pack, Path, str]:
    """How to pack a small source of a kind, and a word in the path of one of its files."""
    if kind == "images":
        return pack_images, image_tree(root, train=4, val=1), "n03/train_2"
    if kind == "clips":
        return pack_clips, clip_tree(root, CLIPS), "-id2_000007_000017/frame_00004"
    names = {"train": [f"id{n}x_000007_000017.mp4" for n in range(4)], "val": ["valx_000007_000017.mp4"]}
    return pack_tree, tree(root, names), "id2x"


KINDS = ("images", "clips", "videos")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_fails_for_a_while_is_repeated(kind, number, tmp_path, monkeypatch, short_pauses):
    pack, source, word = source_of(kind, tmp_path / "source")
    assert pack(source, tmp_path / "calm") == 0
    Storage(monkeypatch, word, 2, number)
    assert pack(source, tmp_path / "out") == 0
    assert sums(tmp_path / "out") == sums(tmp_path / "calm")
    assert short_pauses == [*sources.PAUSES[:2]] and short_pauses == sorted(short_pauses)


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_samples_are_packed_when_the_command_runs_again(kind, tmp_path, monkeypatch, capsys):
    pack, source, word = source_of(kind, tmp_path / "source")
    assert pack(source, tmp_path / "calm") == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Storage(patch, word, float("inf"), errno.EIO)
        assert pack(source, out) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert "1 sample could not be read" in said and "Input/output error" in said
        assert word.partition("/")[0] in said and "run the same command again" in said
        assert not (out / "dataset.json").exists()
        done = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
        assert len(done) == len([*(tmp_path / "calm").glob("*/*.tar")]) - 1
        assert pack(source, out, shard_range="1/1") == 1
    assert done.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}.items()
    capsys.readouterr()
    assert pack(source, out) == 0
    kept = rf"{len(done)} of {len(done) + 1} shards exist already and are kept; the contents .* not compared"
    assert re.search(kept, " ".join(capsys.readouterr().out.split()))
    assert sums(out) == sums(tmp_path / "calm")


def test_a_shard_waits_for_an_outage_once(tmp_path, monkeypatch, capsys, short_pauses):
    source = image_tree(tmp_path / "source", train=6, val=2)
    Storage(monkeypatch, "train_", float("inf"), errno.ESTALE)
    assert pack_images(source, tmp_path / "out", shard_size=9) == 1
    assert "18 samples could not be read" in " ".join(capsys.readouterr().out.split())
    assert short_pauses == [*sources.PAUSES] * 2


def test_a_file_that_stays_unreadable_can_be_rejected(tmp_path, monkeypatch):
    for kind in KINDS:
        pack, source, word = source_of(kind, tmp_path / kind)
        with monkeypatch.context() as patch:
            Storage(patch, word, float("inf"), errno.EIO)
            assert pack(source, tmp_path / "out" / kind, reject_unreadable=True, max_reject=0.5) == 0
        (bad,) = [row for row in rows_of(tmp_path / "out" / kind) if row["status"] == "rejected"]
        assert bad["reason"] == "cannot be read: Input/output error"


def test_permanently_unreadable_files_are_rejected_at_once(tmp_path, monkeypatch, short_pauses):
    source = image_tree(tmp_path / "source", train=4, val=1)
    (source / "train/n01/gone.JPEG").symlink_to("nowhere")
    Storage(monkeypatch, "n02 with spaces/train_1", float("inf"), errno.EACCES)
    assert pack_images(source, tmp_path / "out", max_reject=0.5) == 0
    reasons = {row["reason"] for row in rows_of(tmp_path / "out")} - {""}
    assert reasons == {"cannot be read: Permission denied", "cannot be read: No such file or directory"}
    assert short_pauses == []


def test_a_failing_stat_does_not_count_as_a_missing_file(tmp_path, monkeypatch):
    for kind in KINDS:
        pack, source, word = source_of(kind, tmp_path / kind)
        assert pack(source, tmp_path / "calm" / kind) == 0
        stat, failed = os.stat, []

        def flicker(path, *rest, stat=stat, word=word, failed=failed, **options):
            if word.partition("/frame")[0] in str(path) and not failed:
                failed.append(path)
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return stat(path, *rest, **options)

        with monkeypatch.context() as patch:
            load = sources.repeated

            def load_with_flicker(*words, patch=patch, load=load):
                patch.setattr(os, "stat", flicker)
                return load(*words)

            patch.setattr(sources, "repeated", load_with_flicker)
            assert pack(source, tmp_path / "out" / kind) == 0
            assert len(failed) == 1
        assert sums(tmp_path / "out" / kind) == sums(tmp_path / "calm" / kind)
