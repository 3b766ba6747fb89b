"""Estimates before packing: bytes, files and duration of what is missing, and whether it fits on the disk."""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pipelines.errors import UserError
from tests.tools.test_pack import clip_tree, encoded, image_tree, pack_clips, pack_images, pixels, write
from tools import estimate
from tools.images import BadImage, Packed
from tools.shards import Job, Load, Packing, Sample
from tools.sources import Part

LINE = re.compile(
    r"estimate from (\d+) of (\d+) sources: ([\d.]+) (bytes|kB|MB|GB) in (\d+) tars, "
    r"(?:\d+ days?, )?\d+:\d\d:\d\d with (\d+) process"
)
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def found(text: str) -> tuple[int, int, float, int, int]:
    """(sources loaded, of, bytes, tars, processes) of the line in a command's output."""
    line = LINE.search(text)
    assert line is not None, text
    size = float(line[3]) * UNITS[line[4]]
    return int(line[1]), int(line[2]), size, int(line[5]), int(line[6])


def bytes_of(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_the_estimate_is_close_to_what_is_written(kind: str, tmp_path: Path, capsys):
    if kind == "pictures":
        source = image_tree(tmp_path / "source", train=80, val=10, size=(340, 256))
        assert pack_images(source, tmp_path / "out") == 0
        expected = (32, 270, 30 + 4, 1)  # 240 and 30 samples in shards of 8
    else:
        labels = ["a", "b"]
        rows = {"train": [(labels[n % 2], f"id{n}") for n in range(220)], "val": [("a", "val0")]}
        source = clip_tree(tmp_path / "source", rows, frames=3)
        assert pack_clips(source, tmp_path / "out", shard_size=20) == 0
        expected = (32, 221, 11 + 1, 1)
    loaded, of, size, tars, processes = found(capsys.readouterr().out)
    assert (loaded, of, tars, processes) == expected
    assert len([*(tmp_path / "out").glob("*/*.tar")]) == tars
    assert size == pytest.approx(bytes_of(tmp_path / "out"), rel=0.1)


def test_a_resumed_packing_and_a_part_count_only_what_they_pack(tmp_path: Path, capsys):
    source = image_tree(tmp_path / "source", train=150, val=0)
    assert pack_images(source / "train", tmp_path / "whole", val_fraction=0, shard_size=30) == 0
    _, of, whole, tars, _ = found(capsys.readouterr().out)
    assert (of, tars) == (450, 15)
    assert (
        pack_images(source / "train", tmp_path / "out", val_fraction=0, shard_size=30, shard_range="1/2") == 0
    )
    _, of, size, tars, _ = found(capsys.readouterr().out)
    assert (of, tars) == (240, 8) and size == pytest.approx(whole * 8 / 15, rel=0.1)
    assert pack_images(source / "train", tmp_path / "out", val_fraction=0, shard_size=30) == 0
    _, of, size, tars, _ = found(capsys.readouterr().out)
    assert (of, tars) == (210, 7) and size == pytest.approx(whole * 7 / 15, rel=0.1)


def test_a_small_plan_has_no_estimate(tmp_path: Path, capsys):
    assert (
        pack_images(image_tree(tmp_path / "source", train=60, val=5), tmp_path / "out") == 0
    )  # 195 pictures
    assert "estimate" not in capsys.readouterr().out


def test_what_does_not_fit_on_the_disk_is_refused_and_leaves_no_folder(tmp_path: Path, monkeypatch, capsys):
    source = image_tree(tmp_path / "source", train=80, val=10)
    small = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: small)
    out = tmp_path / "deep" / "out"
    words = r"packing into .*out needs about [\d.]+ [MG]B and .* has 200\.0 kB free; .*--ignore-free-space\."
    with pytest.raises(UserError, match=words):
        pack_images(source, out)
    with pytest.raises(UserError, match=words):  # all parts together do not fit, so no part may start
        pack_images(source, out, shard_range="1/1")
    assert not out.parent.exists()
    assert pack_images(source, out, ignore_free_space=True) == 0
    assert "200.0 kB are free in" in capsys.readouterr().out


def test_rejected_sources_are_counted_with_the_most_frequent_reason(tmp_path: Path, capsys):
    source = tmp_path / "source"
    for number in range(220):
        good = encoded(pixels(number)) if number % 2 else b"text"
        write(source / "a" / f"{number}.jpg", good)
    assert pack_images(source, tmp_path / "out", max_reject=1.0) == 0
    text = capsys.readouterr().out
    line = re.search(r"; (\d+) of the 32 are rejected, (\d+) as 'not an image'", text)
    assert line is not None and 6 < int(line[1]) == int(line[2]) < 26


# ---- limits of time ---------------------------------------------------------------------------------------


def job(count: int, load: Load) -> Job:
    packing = Packing(256, count, 10**8, 0.0, "")
    samples: Sequence[Sample] = [Sample(f"{n:08d}-x", -1, "", f"{n}") for n in range(count)]
    return Job(Path(), Path(), 0, samples, "image", packing, load)


def slow(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
    time.sleep(0.1)
    yield Packed([bytes(1000)], (8, 8), "copied")


def test_sampling_stops_after_some_seconds():
    begin = time.monotonic()
    measured = estimate.measure([job(300, slow)], seconds=0.3)
    assert time.monotonic() - begin < 3
    assert measured is not None and 1 <= measured.sources <= 9
    assert measured.seconds == pytest.approx(0.1, rel=0.5)
    assert estimate.measure([job(300, slow)], seconds=0.02) is None


def test_few_sources_get_more_time():
    """The first one may take seconds, because it imports modules."""
    measured = estimate.measure([job(300, slow)], seconds=1.2)
    assert measured is not None and measured.sources == estimate.FEWEST


def test_sources_are_spread_over_all_jobs_and_problems_do_not_end_the_estimate():
    loaded: list[int] = []

    def load(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
        loaded.append(int(source))
        if len(loaded) == 3:
            raise BadImage("not an image")
        if len(loaded) == 4:
            raise OSError(5, "Input/output error")
        yield Packed([bytes(1000)], (8, 8), "copied")

    measured = estimate.measure([job(100, load), job(1, load), job(100, load)], samples=10)
    assert measured is not None and measured.sources == 10
    assert dict(measured.rejected) == {"not an image": 1, "cannot be read: Input/output error": 1}
    assert len(loaded) == 10 and sum(number >= 50 for number in loaded) in (4, 5, 6)
    # In a tar, each file has a header of 512 bytes and whole blocks: a frame 1024, label and text 512 each.
    assert 0.8 * (3 * 512 + 1024 + 2 * 512) <= measured.files <= 3 * 512 + 1024 + 2 * 512 + 400


def test_a_source_that_yields_several_samples_counts_all_of_them():
    def load(root: Path, source: str, packing: Packing) -> Iterator[Part]:
        yield Packed([bytes(1000)], (8, 8), "copied")
        yield BadImage("damaged")
        yield Packed([bytes(1000)], (8, 8), "copied")

    def one(root: Path, source: str, packing: Packing) -> Iterator[Part]:
        yield Packed([bytes(1000)], (8, 8), "copied")

    several, single = (estimate.measure([job(5, how)]) for how in (load, one))
    assert several is not None and single is not None
    assert several.files == pytest.approx(2 * single.files, rel=0.05)
