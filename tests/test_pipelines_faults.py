"""Damage after packing: named once, replaced by the same samples however the run is cut, counted, bounded."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from pipelines_fixtures import clip_dataset, image_dataset

from pipelines.catalogue import open_catalogue
from pipelines.errors import UserError
from pipelines.loader import ViewSpec, eval_batches, train_batches

CPU = torch.device("cpu")


def damage(catalogue, sample, frame=0, by=b"\0"):
    """Overwrite a frame's bytes inside its tar."""
    row = int(catalogue.first_frame[sample]) + frame
    with catalogue.tar_path(int(catalogue.shard[sample])).open("r+b") as tar:
        tar.seek(int(catalogue.offset[row]))
        tar.write((by * int(catalogue.size[row]))[: int(catalogue.size[row])])


@pytest.fixture
def images(tmp_path):
    catalogue = open_catalogue(image_dataset(tmp_path / "images"), "train")
    damage(catalogue, 4)
    damage(catalogue, 17, by=b"<html>")
    return catalogue


def train(catalogue, view, steps, **options):
    options = {"rank": 0, "world": 1, "max_bad": 0.2, "threads": 2} | options
    batches = train_batches(catalogue, view, seed=0, global_batch=12, device=CPU, **options)
    return list(itertools.islice(batches, steps))


def test_damaged_samples_are_replaced_named_once_and_counted(images, capfd):
    batches = train(images, ViewSpec(32), 8)  # more than three epochs
    ids = np.concatenate([batch.ids for batch in batches])
    assert not set(ids) & {4, 17} and 2 * 3 <= sum(batch.bad for batch in batches) <= 2 * 4
    assert all((batch.labels.numpy() == batch.ids % 3).all() for batch in batches)
    said = capfd.readouterr().err
    offset = int(images.offset[4])
    assert said.count(f"000000.tar: 00000004-x.jpg at byte {offset} is not what was packed") == 1
    assert said.count("000002.tar: 00000017-x.jpg") == 1


def test_replacement_does_not_depend_on_start_or_ranks(images):
    whole = train(images, ViewSpec(32), 6)
    late = train(images, ViewSpec(32), 3, start_step=3)
    for a, b in zip(whole[3:], late, strict=True):
        assert np.array_equal(a.ids, b.ids) and torch.equal(a.pixels, b.pixels)
    ranks = [train(images, ViewSpec(32), 6, rank=rank, world=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert np.array_equal(batch.ids, np.concatenate([part.ids for part in parts]))
        assert torch.equal(batch.pixels, torch.cat([part.pixels for part in parts]))


def test_evaluation_leaves_damaged_samples_out(images):
    batches = list(eval_batches(images, ViewSpec(24), batch=8, rank=0, world=1, device=CPU, max_bad=0.2))
    seen = np.concatenate([batch.ids[batch.valid] for batch in batches])
    assert sorted(seen) == sorted(set(range(30)) - {4, 17}) and sum(batch.bad for batch in batches) == 2


def test_too_much_damage_stops_with_the_list(images):
    with pytest.raises(UserError, match=r"2 samples are damaged, more than the 1 allowed.*00000017-x"):
        train(images, ViewSpec(32), 8, max_bad=0.001)


def test_a_clip_fails_only_when_its_window_meets_the_damage(tmp_path):
    catalogue = open_catalogue(clip_dataset(tmp_path / "clips", [40] * 6), "train")
    damage(catalogue, 2, frame=20)
    view = ViewSpec(16, frames=4, repeats=2)
    batches = train(catalogue, view, 12, max_bad=0.5)
    ids = np.concatenate([batch.ids for batch in batches])
    bad = sum(batch.bad for batch in batches)
    assert 0 < (ids == 2).sum() < 24 and 0 < bad < 24  # 24 = 12 epochs x 2 repeats
    again = train(catalogue, view, 4, max_bad=0.5, start_step=8)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(batches[8:], again, strict=True))


def test_views_that_share_a_decode_are_replaced_together(tmp_path):
    catalogue = open_catalogue(clip_dataset(tmp_path / "clips", [40] * 6, size=(64, 32)), "train")
    damage(catalogue, 3, frame=20)
    view = ViewSpec(16, frames=4, repeats=3, same_clip=True)
    for batch in train(catalogue, view, 8, max_bad=0.5):
        assert (batch.ids.reshape(-1, 3) == batch.ids[::3, None]).all()
    views = {"temporal": 5, "spatial": 3, "max_bad": 0.5}
    batches = list(eval_batches(catalogue, view, batch=4, rank=0, world=1, device=CPU, **views))
    seen = np.concatenate([batch.ids[batch.valid] for batch in batches])
    assert np.bincount(seen).tolist() == [15, 15, 15, 0, 15, 15]


def test_a_tar_cut_short_is_damage_like_any_other(tmp_path):
    root = image_dataset(tmp_path / "images")
    tar = root / "train" / "000001.tar"
    shutil.copy(tar, tmp_path / "whole.tar")
    with tar.open("r+b") as file:
        file.truncate(1000)
    catalogue = open_catalogue(root, "train")
    batches = train(catalogue, ViewSpec(32), 4, max_bad=0.5)
    assert not set(np.concatenate([batch.ids for batch in batches])) & set(range(8, 16))
