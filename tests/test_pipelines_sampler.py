"""Order, windows, frames and masks: functions of (seed, epoch, sample) with the right distributions."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipelines import order


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 255, 256, 257, 1000, 4097, 70_001])
def test_every_epoch_is_a_permutation(size):
    epochs, ids = order.sample_at(np.arange(3 * size), size, seed=7)
    assert np.array_equal(epochs, np.repeat(np.arange(3), size))
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epoch * size : (epoch + 1) * size]), np.arange(size))


def test_orders_differ_between_epochs_and_seeds_and_look_random():
    size = 10_000
    _, ids = order.sample_at(np.arange(2 * size), size, seed=0)
    _, other = order.sample_at(np.arange(size), size, seed=1)
    first, second = ids[:size], ids[size:]
    for a, b in [(first, second), (first, other), (first, np.arange(size)), (first[:-1], first[1:])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
        assert (a == b).mean() < 0.01


@pytest.mark.parametrize("window", [1, 7, 64, 10_000])
def test_local_order_is_exact_and_stays_near(window):
    shards = np.repeat(np.arange(10), [50, 50, 50, 13, 50, 1, 50, 50, 50, 49])
    size = len(shards)
    order = order.local_order(shards, 3, window)
    epochs, ids = order(np.arange(3 * size))
    assert np.array_equal(epochs, np.repeat(np.arange(3), size))
    firsts = [ids[: size // 2], ids[size : size + size // 2]]
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epoch * size : (epoch + 1) * size]), np.arange(size))
    assert not np.array_equal(*firsts)
    some = np.array([900, 5, 412, 411, 77])
    assert np.array_equal(order(some)[1], ids[some])  # stateless: any positions in any order
    if window == 64:  # at most the shards of one window, and those that straddle its ends, are in use
        assert max(len(set(shards[ids[at : at + 64]])) for at in range(0, size, 64)) <= 5
        assert (np.diff(ids[:64]) != 1).mean() > 0.8


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 5, 50, 101])
def test_each_id_once_per_epoch_at_any_number_of_ranks(world, size):
    batch, steps = 24, size  # steps * batch positions are 24 whole epochs
    ids = [
        order.sample_at(order.batch_positions(step, batch, rank, world, 1).ravel(), size, seed=3)
        for step in range(steps)
        for rank in range(world)
    ]
    epochs, ids = np.concatenate([e for e, _ in ids]), np.concatenate([i for _, i in ids])
    counts = np.zeros((24, size), int)
    np.add.at(counts, (epochs, ids), 1)
    assert (counts == 1).all()


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (3, 2), (8, 3)])
def test_a_step_holds_the_same_positions_however_it_is_split(world, accumulate):
    parts = [order.batch_positions(5, 48, rank, world, accumulate) for rank in range(world)]
    assert parts[0].shape == (accumulate, 48 // (world * accumulate))
    assert np.array_equal(np.sort(np.concatenate(parts, axis=None)), 5 * 48 + np.arange(48))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_each_id_once(size, world):
    ids = np.concatenate([order.eval_ids(size, rank, world) for rank in range(world)])
    assert np.array_equal(np.sort(ids), np.arange(size))


def test_uniform_is_uniform_and_depends_on_every_key():
    ids, zeros = np.arange(20_000), np.zeros(20_000, int)
    draws = order.uniform(0, zeros, ids, 0, 3)
    assert draws.shape == (20_000, 3)
    assert draws.min() >= 0 and draws.max() < 1
    histogram = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((histogram - 3000) ** 2 / 3000).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4
    others = [
        order.uniform(1, zeros, ids, 0, 3),
        order.uniform(0, zeros + 1, ids, 0, 3),
        order.uniform(0, zeros - 1, ids, 0, 3),
        order.uniform(0, zeros, ids, 1, 3),
        order.uniform(0, zeros, ids + 1, 0, 3),
    ]
    for other in [*others, draws[:, ::-1]]:
        assert abs(np.corrcoef(draws[:, 0], other[:, 0])[0, 1]) < 0.03
    again = order.uniform(0, zeros[77:78], ids[77:78], 0, 3)
    assert np.array_equal(again[0], draws[77])  # a sample's draws do not depend on its batch


def test_kept_units_are_uniform_sorted_subsets():
    ids = np.arange(8000)
    kept = order.keep_units(0, np.zeros(8000, int), ids, units=49, kept=20)
    assert kept.shape == (8000, 20) and kept.dtype == np.int64
    assert (np.diff(kept, axis=1) > 0).all() and kept.min() == 0 and kept.max() == 48
    share = np.bincount(kept.ravel(), minlength=49) / 8000
    assert np.abs(share - 20 / 49).max() < 0.03
    evaluation = order.keep_units(0, np.full(8000, order.EVALUATION), ids, 49, 20)
    assert (evaluation != kept).any()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (224, 224), (120, 400)])
def test_crop_windows_have_torchvisions_distribution(width, height):
    count = 3000
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    draws = order.uniform(0, np.zeros(count, int), np.arange(count), order.STREAM_WINDOW, 22)
    sides = np.full(count, width), np.full(count, height)
    ours = order.random_resized_crop(draws, *sides, scale, ratio).astype(float)
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
def test_extreme_shapes_fall_back_to_the_widest_central_window(width, height, window):
    draws = order.uniform(0, np.zeros(50, int), np.arange(50), 0, 22)
    sides = np.full(50, width), np.full(50, height)
    windows = order.random_resized_crop(draws, *sides, (0.9, 1.0), (3 / 4, 4 / 3))
    assert (windows == np.array(window)).all()


def test_evaluation_windows_are_central_or_run_along_the_long_side():
    width, height = np.array([340, 256]), np.array([256, 340])
    assert order.eval_windows(width, height, 0.875, 1).tolist() == [
        [[58, 16, 224, 224]],
        [[16, 58, 224, 224]],
    ]
    three = order.eval_windows(width, height, 1.0, 3)
    assert three[0].tolist() == [[0, 0, 256, 256], [42, 0, 256, 256], [84, 0, 256, 256]]
    assert three[1].tolist() == [[0, 0, 256, 256], [0, 42, 256, 256], [0, 84, 256, 256]]


def test_training_clips_start_anywhere_and_keep_their_stride():
    draws = order.uniform(0, np.zeros(4000, int), np.arange(4000), order.STREAM_START, 1)[:, 0]
    frames = order.clip_frames_train(draws, np.full(4000, 70), 16, 4)
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
def test_short_clips_shrink_their_stride_then_repeat_the_last_frame(count, expected):
    assert order.clip_frames_eval(np.array([count]), 4, 4)[0, 0].tolist() == expected
    trained = order.clip_frames_train(np.array([0.999]), np.array([count]), 4, 4)
    assert trained.max() <= count - 1 and (np.diff(trained) >= 0).all()


def test_temporal_views_reach_from_end_to_end():
    views = order.clip_frames_eval(np.array([101]), 16, 4, views=5)[0]
    assert views[:, 0].tolist() == [0, 10, 20, 30, 40] and views[-1, -1] == 100
