"""Damage after packing is reported once, replaced deterministically, counted and limited."""

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig
from pipelines.dataset import check_shards, open_dataset, read_info
from pipelines.errors import UserError
from tests.pipelines_fixtures import (
    clip_dataset,
    evaluation,
    image_dataset,
    jpeg,
    picture,
    train,
    train_loader,
    write_dataset,
)


def damage(catalogue, sample, frame=0, by=b"\0"):
    """Overwrite a frame's bytes inside its tar."""
    row = int(catalogue.first_frame[sample]) + frame
    with catalogue.tar_path(int(catalogue.shard[sample])).open("r+b") as tar:
        tar.seek(int(catalogue.offset[row]))
        tar.write((by * int(catalogue.size[row]))[: int(catalogue.size[row])])


@pytest.fixture
def images(tmp_path):
    catalogue = open_dataset(image_dataset(tmp_path / "images"), "train")
    damage(catalogue, 4)
    damage(catalogue, 17, by=b"<html>")
    return catalogue


def config(max_bad=0.2, **settings) -> DataConfig:
    return DataConfig(**{"size": 32} | settings, max_bad=max_bad)


def test_damaged_samples_are_replaced_reported_once_and_counted(images, capfd):
    batches = train(images, config(), 8)  # more than three epochs
    ids = np.concatenate([batch.ids for batch in batches])
    assert not set(ids) & {4, 17} and 2 * 3 <= sum(batch.bad for batch in batches) <= 2 * 4
    assert all((batch.labels.numpy() == batch.ids % 3).all() for batch in batches)
    printed = capfd.readouterr().err
    offset = int(images.offset[4])
    assert printed.count(f"000000.tar: 00000004-x.jpg at byte {offset} is not what was packed") == 1
    assert printed.count("000002.tar: 00000017-x.jpg") == 1


def test_replacements_do_not_depend_on_the_first_step_or_the_ranks(images):
    whole = train(images, config(), 6)
    late = train(images, config(), 3, start_step=3)
    for a, b in zip(whole[3:], late, strict=True):
        assert np.array_equal(a.ids, b.ids) and torch.equal(a.pixels, b.pixels)
    ranks = [train(images, config(), 6, rank=rank, world=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert np.array_equal(batch.ids, np.concatenate([part.ids for part in parts]))
        assert torch.equal(batch.pixels, torch.cat([part.pixels for part in parts]))


def test_evaluation_skips_damaged_samples(images, capfd):
    batches = evaluation(images, config(size=24), 8)
    seen = np.concatenate([batch.ids[batch.valid] for batch in batches])
    assert sorted(seen) == sorted(set(range(30)) - {4, 17}) and sum(batch.bad for batch in batches) == 2
    assert capfd.readouterr().err.count("; the evaluation leaves it out\n") == 2


def test_too_much_damage_stops_with_a_list_of_samples(images):
    with pytest.raises(UserError, match=r"2 samples are damaged, more than the 1 allowed.*00000017-x"):
        train(images, config(0.001), 8)


def test_the_limit_does_not_depend_on_the_ranks_and_epochs(tmp_path):
    """2 of 400 samples are damaged and 4 are allowed: no rank stops, even if it reads both."""
    pictures = [[jpeg(picture(16, 16, seed))] for seed in range(400)]
    catalogue = open_dataset(write_dataset(tmp_path / "images", pictures, "image", per_shard=200), "train")
    damage(catalogue, 7)
    damage(catalogue, 311)
    bad = 0
    for rank in range(8):
        bad += sum(batch.bad for batch in train_many(catalogue, rank, 8, epochs=6))
    assert bad == 2 * 6
    for sample in range(40, 46):
        damage(catalogue, sample)
    with pytest.raises(UserError, match="samples are damaged, more than the 4 allowed"):
        train_many(catalogue, 0, 1, epochs=1)


def train_many(catalogue, rank, world, epochs):
    """The batches of one rank in whole epochs of 400 samples."""
    return train(catalogue, config(0.01, size=8), epochs, batch=400, rank=rank, world=world)


def test_a_clip_is_replaced_only_if_its_window_has_the_damaged_frame(tmp_path):
    catalogue = open_dataset(clip_dataset(tmp_path / "clips", [40] * 6), "train")
    damage(catalogue, 2, frame=20)
    view = config(0.5, size=16, frames=4, repeats=2)
    batches = train(catalogue, view, 12)
    ids = np.concatenate([batch.ids for batch in batches])
    bad = sum(batch.bad for batch in batches)
    assert 0 < (ids == 2).sum() < 24 and 0 < bad < 24  # 24 = 12 epochs x 2 repeats
    again = train(catalogue, view, 4, start_step=8)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(batches[8:], again, strict=True))


def test_views_that_share_a_decode_are_replaced_together(tmp_path):
    catalogue = open_dataset(clip_dataset(tmp_path / "clips", [40] * 6, size=(64, 32)), "train")
    damage(catalogue, 3, frame=20)
    view = config(0.5, size=16, frames=4, repeats=3, same_clip=True)
    for batch in train(catalogue, view, 8):
        assert (batch.ids.reshape(-1, 3) == batch.ids[::3, None]).all()
    batches = evaluation(catalogue, view, 4, views=(5, 3))
    seen = np.concatenate([batch.ids[batch.valid] for batch in batches])
    assert np.bincount(seen).tolist() == [15, 15, 15, 0, 15, 15]


@pytest.mark.parametrize("kind", ["images", "clips"])
def test_a_frame_with_a_correct_checksum_that_does_not_decode_is_named(tmp_path, kind):
    samples = [[jpeg(picture(64, 48, 10 * seed + k)) for k in range(4)] for seed in range(12)]
    samples[5][2] = samples[5][2][:-300]
    if kind == "images":
        samples = [[frames[2]] for frames in samples]
    root = write_dataset(tmp_path / "d", samples, "image" if kind == "images" else "video")
    dataset = open_dataset(root, "train")
    view = config(frames=1 if kind == "images" else 4, stride=1, repeats=2)
    name = "00000005-x.jpg" if kind == "images" else r"00000005-x\.f0002\.jpg"
    sentence = rf"000000\.tar: {name} at byte \d+ does not decode, although its checksum is correct \(.+\); "
    for read in (lambda: train(dataset, view, 2, batch=24), lambda: evaluation(dataset, view, 4)):
        with pytest.raises(UserError, match=rf"{sentence}inspect it with `make verify DATA=") as raised:
            read()
        assert "\n" not in str(raised.value)


# ---- data faults of `make faults` ------------------------------------------------------------------------


def swap(one: Path, other: Path) -> None:
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def ids_of(batches):
    return np.concatenate([batch.ids for batch in batches])


@pytest.mark.fault
def test_a_shard_is_cut_off(tmp_path):
    """The check before training refuses it; the loader replaces samples beyond the cut."""
    root = image_dataset(tmp_path / "images")
    tar = root / "train" / "000001.tar"
    whole = tar.read_bytes()
    check_shards(read_info(root))
    for length in (0, 1, 511, 512, 1000, 5000, len(whole) // 2, len(whole) - 1):
        tar.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"000001\.tar has another length than when it was packed; restore"
        ):
            check_shards(read_info(root))
    tar.write_bytes(whole[:1000])
    batches = train(open_dataset(root, "train"), config(0.5), 4)
    assert not set(ids_of(batches)) & set(range(8, 16))
    tar.unlink()
    with pytest.raises(UserError, match=r"000001\.tar is missing; restore"):
        check_shards(read_info(root))


@pytest.mark.fault
def test_a_bit_is_flipped_in_a_frame(tmp_path):
    """Every flip is detected, also if a decoder would conceal it; other frames are unaffected."""
    root = clip_dataset(tmp_path / "clips", [5] * 6)
    catalogue = open_dataset(root, "train")
    tar = root / "train" / "000000.tar"
    whole = tar.read_bytes()
    ids, frames = np.arange(6), np.tile(np.arange(5), (6, 1))
    random = np.random.default_rng()
    for _ in range(200):
        frame = int(random.integers(30))
        place = int(catalogue.offset[frame] + random.integers(catalogue.size[frame]))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        tar.write_bytes(damaged)
        read = catalogue.read(ids, frames)
        assert [index for index, jpeg in enumerate(read) if not len(jpeg)] == [frame], place


@pytest.mark.fault
@pytest.mark.parametrize("other", ["swapped", "of another packing"])
def test_a_shard_is_replaced_by_another(tmp_path, other):
    """If its length is right, training stops and names the shard and what to do."""
    root = image_dataset(tmp_path / "images")
    if other == "swapped":
        swap(root / "train/000000.tar", root / "train/000001.tar")
        printed = r"000000\.tar, .*000001\.tar must have been replaced or swapped since packing: restore them"
    else:
        pictures = [[jpeg(picture(96, 72, 100 + seed))] for seed in range(30)]
        strange = write_dataset(tmp_path / "other", pictures, "image")
        shutil.copy(strange / "train/000001.tar", root / "train/000001.tar")
        printed = r"allowed; .*000001\.tar must have been replaced or swapped since packing: restore them"
    check_shards(read_info(root))
    with pytest.raises(UserError, match=printed):
        train(open_dataset(root, "train"), config(0.1), 10)
    with pytest.raises(UserError, match=printed):
        catalogue = open_dataset(root, "train")
        evaluation(catalogue, config(0.1, size=24), 30)


@pytest.mark.fault
def test_a_shard_is_cut_off_while_it_is_read(tmp_path):
    """Missing samples are replaced and counted; above the limit training stops with one line and no crash."""
    root = image_dataset(tmp_path / "images")
    catalogue = open_dataset(root, "train")
    batches = iter(train_loader(catalogue, config(0.5), batch=6))
    first = [next(batches) for _ in range(3)]
    os.truncate(root / "train/000001.tar", 0)
    later = [next(batches) for _ in range(30)]
    assert not sum(batch.bad for batch in first) and sum(batch.bad for batch in later) > 10
    assert not set(ids_of(later[10:])) & set(range(8, 16))  # ten were made before
    os.truncate(root / "train/000000.tar", 0)
    os.truncate(root / "train/000002.tar", 0)
    with pytest.raises(UserError, match=r"samples are damaged, more than the 15 allowed; .*000000\.tar, .*"):
        list(batches)


@pytest.mark.fault
def test_a_shard_is_deleted_while_it_is_read(tmp_path):
    """Open shards are still read; if a shard is not yet open, training stops and names it."""
    root = image_dataset(tmp_path / "images")
    undisturbed = train(open_dataset(root, "train"), config(), 9)
    catalogue = open_dataset(root, "train")
    batches = iter(train_loader(catalogue, config()))
    got = [next(batches) for _ in range(4)]
    for tar in (root / "train").glob("*.tar"):
        tar.unlink()
    (root / "train.arrow").write_bytes(b"")  # the catalogue is not read again
    got += [next(batches) for _ in range(5)]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(got, undisturbed, strict=True))
    with pytest.raises(UserError, match=r"00000\d\.tar cannot be opened \(No such file"):
        train(replace(catalogue), config(), 1)


@pytest.mark.fault
def test_a_shard_cannot_be_read(tmp_path):
    """A shard that opens but cannot be read, here a folder, counts as damaged: no traceback."""
    root = image_dataset(tmp_path / "images")
    (root / "train/000001.tar").unlink()
    (root / "train/000001.tar").mkdir()
    with pytest.raises(UserError, match=r"000001\.tar is missing"):
        check_shards(read_info(root))
    catalogue = open_dataset(root, "train")
    assert not set(ids_of(train(catalogue, config(0.5), 4))) & set(range(8, 16))


@pytest.mark.fault
def test_the_catalogue_is_damaged(tmp_path):
    """If it is cut off or has a flipped bit, it is refused with one line."""
    root = clip_dataset(tmp_path / "clips", [3, 9, 4])
    path = root / "train.arrow"
    whole = path.read_bytes()
    random = np.random.default_rng()
    damaged = [whole[: len(whole) * share // 20] for share in range(20)]
    for place in random.integers(0, len(whole), 300).tolist():
        damaged.append(bytearray(whole))
        damaged[-1][place] ^= 1 << int(random.integers(8))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train\.arrow cannot be read .*; pack this dataset again"):
            open_dataset(root, "train")


@pytest.mark.fault
def test_the_catalogue_shrinks_while_it_is_used(tmp_path):
    """Its numbers are in memory, so training continues."""
    root = image_dataset(tmp_path / "images")
    batches = iter(train_loader(open_dataset(root, "train"), config()))
    next(batches)
    (root / "train.arrow").write_bytes(b"")
    assert [next(batches).bad for _ in range(12)] == [0] * 12


@pytest.mark.fault
def test_dataset_json_is_damaged(tmp_path):
    """If it is cut off, it is refused with one line; a flipped bit never causes a traceback."""
    root = image_dataset(tmp_path / "images", count=2)
    path, good = root / "dataset.json", read_info(root)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"dataset\.json is damaged .*; pack this dataset again"):
            read_info(root)
    taken = 0
    for place in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(UserError):  # anything else fails this test
            taken += read_info(root).kind == good.kind
    assert taken < len(whole)  # letters of class names, digits of counts
