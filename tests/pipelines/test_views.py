"""Crops and frames: their distributions, and their dependence on (seed, epoch, sample)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipelines import order, views
from pipelines.config import DataConfig


@pytest.mark.parametrize(("width", "height"), [(500, 375), (224, 224), (120, 400)])
def test_crops_have_torchvisions_distribution(width, height):
    count = 3000
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    draws = order.uniform(0, np.zeros(count, int), np.arange(count), order.STREAM_WINDOW, 22)
    sides = np.full(count, width), np.full(count, height)
    ours = views.random_resized_crop(draws, *sides, scale, ratio).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]
    theirs = np.array([(x, y, w, h) for y, x, h, w in drawn], float)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all() and (ours[:, 1] + ours[:, 3] <= height).all()
    for a, b in [*zip(ours.T, theirs.T, strict=True), (ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])]:
        grid = np.sort(np.concatenate([a, b]))
        gap = np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")
        assert np.abs(gap).max() / count < 0.05  # Kolmogorov-Smirnov, p < 0.001


@pytest.mark.parametrize(
    ("width", "height", "window"), [(1000, 10, (493, 0, 13, 10)), (8, 90, (0, 39, 8, 11))]
)
def test_extreme_shapes_use_the_largest_central_crop(width, height, window):
    draws = order.uniform(0, np.zeros(50, int), np.arange(50), 0, 22)
    sides = np.full(50, width), np.full(50, height)
    windows = views.random_resized_crop(draws, *sides, (0.9, 1.0), (3 / 4, 4 / 3))
    assert (windows == np.array(window)).all()


def test_evaluation_crops_are_central_or_along_the_long_side():
    width, height = np.array([340, 256]), np.array([256, 340])
    assert views.eval_windows(width, height, 0.875, 1).tolist() == [
        [[58, 16, 224, 224]],
        [[16, 58, 224, 224]],
    ]
    three = views.eval_windows(width, height, 1.0, 3)
    assert three[0].tolist() == [[0, 0, 256, 256], [42, 0, 256, 256], [84, 0, 256, 256]]
    assert three[1].tolist() == [[0, 0, 256, 256], [0, 42, 256, 256], [0, 84, 256, 256]]


def clips(*counts: int) -> SimpleNamespace:
    """A stand-in for a dataset of clips with these lengths, at 30 frames per second."""
    return SimpleNamespace(frame_counts=lambda ids: np.array(counts)[ids], info=SimpleNamespace(fps=30.0))


def test_training_clips_start_anywhere_with_a_constant_stride():
    zeros, config = np.zeros(4000, int), DataConfig(frames=16)
    frames = views.train_frames(clips(70), config, 0, zeros, np.arange(4000))
    assert (np.diff(frames, axis=1) == 4).all()
    assert set(frames[:, 0]) == set(range(10)) and frames.max() == 69


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [0, 0, 0, 0]),
        (2, [0, 1, 1, 1]),
        (4, [0, 1, 2, 3]),
        (9, [1, 3, 5, 7]),
        (13, [0, 4, 8, 12]),
        (20, [3, 7, 11, 15]),
    ],
)
def test_short_clips_reduce_the_stride_and_then_repeat_the_last_frame(count, expected):
    config = DataConfig(frames=4)
    assert views.eval_frames(clips(count), config, np.arange(1), 1)[0, 0].tolist() == expected
    trained = views.train_frames(clips(count), config, 0, np.zeros(50, int), np.arange(50))
    assert trained.max() <= count - 1 and (np.diff(trained) >= 0).all()


def test_temporal_views_cover_the_whole_clip():
    found = views.eval_frames(clips(101), DataConfig(frames=16), np.arange(1), 5)[0]
    assert found[:, 0].tolist() == [0, 10, 20, 30, 40] and found[-1, -1] == 100


def test_a_configured_first_frame_is_used_or_the_last_possible_one():
    config = DataConfig(frames=8, stride=1, clip_start=10, eval_clip_start=40)
    dataset, ids = clips(20, 100), np.arange(2)
    trained = views.train_frames(dataset, config, 0, ids, ids)
    assert trained[:, 0].tolist() == [10, 10]
    assert views.eval_frames(dataset, config, ids, 2)[:, :, 0].tolist() == [[12, 12], [40, 40]]
