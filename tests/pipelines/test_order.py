"""The order of samples and the kept mask units: uniform functions of (seed, epoch, sample)."""

import numpy as np
import pytest

from models import layers
from pipelines import order


@pytest.mark.parametrize("module", [order, layers])
def test_every_kind_of_draw_has_its_own_stream_and_those_of_randaugment_come_last(module):
    streams = {name: value for name, value in vars(module).items() if name.startswith("STREAM_")}
    last = streams.pop("STREAM_RAND", 100)
    alike = {name: value for name, value in streams.items() if list(streams.values()).count(value) > 1}
    assert alike == {}, "two kinds of draws of a sample would be equal"
    assert len(streams) >= 3 and max(streams.values()) < last == 100


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
def test_local_order_is_a_permutation_and_stays_within_its_window(window):
    shards = np.repeat(np.arange(10), [50, 50, 50, 13, 50, 1, 50, 50, 50, 49])
    size = len(shards)
    local = order.make_order("local", shards, 3, window)
    epochs, ids = local(np.arange(3 * size))
    assert np.array_equal(epochs, np.repeat(np.arange(3), size))
    firsts = [ids[: size // 2], ids[size : size + size // 2]]
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epoch * size : (epoch + 1) * size]), np.arange(size))
    assert not np.array_equal(*firsts)
    some = np.array([900, 5, 412, 411, 77])
    assert np.array_equal(local(some)[1], ids[some])  # stateless: positions can be requested in any order
    if window == 64:  # only the shards that overlap one window are in use
        assert max(len(set(shards[ids[at : at + 64]])) for at in range(0, size, 64)) <= 5
        assert (np.diff(ids[:64]) != 1).mean() > 0.8


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 5, 50, 101])
def test_every_id_occurs_once_per_epoch_with_any_number_of_ranks(world, size):
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
def test_a_step_has_the_same_positions_however_it_is_divided(world, accumulate):
    parts = [order.batch_positions(5, 48, rank, world, accumulate) for rank in range(world)]
    assert parts[0].shape == (accumulate, 48 // (world * accumulate))
    assert np.array_equal(np.sort(np.concatenate(parts, axis=None)), 5 * 48 + np.arange(48))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_has_every_id_once(size, world):
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
