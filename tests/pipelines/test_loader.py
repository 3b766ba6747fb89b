"""Batches from real DALI graphs: pixels, samples, and independence of how a run is divided."""

import io
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models import layers
from pipelines import machine, order
from pipelines.config import Augment, DataConfig, DecodeConfig
from pipelines.dataset import open_dataset
from pipelines.decode import Decoder
from pipelines.errors import UserError
from pipelines.loader import prefetch
from pipelines.machine import sizing
from pipelines.views import clip_notes, train_rows
from tests.pipelines_fixtures import (
    clip_dataset,
    evaluation,
    frame_bytes,
    image_dataset,
    jpeg,
    picture,
    train,
    train_loader,
    write_dataset,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_dataset(image_dataset(tmp_path_factory.mktemp("data") / "images"), "train")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = clip_dataset(tmp_path_factory.mktemp("data") / "clips", [1, 3, 9, 20, 40, 64, 70])
    return open_dataset(root, "train")


def rows(batches):
    """{(epoch, id): pixels} of batches."""
    return {
        (int(epoch), int(sample)): batch.pixels[row]
        for batch in batches
        for row, (epoch, sample) in enumerate(zip(batch.epochs, batch.ids, strict=True))
    }


def test_training_batches_have_their_shapes_and_labels(images, clips):
    (batch,) = train(images, DataConfig(size=32), 1)
    assert batch.pixels.shape == (12, 32, 32, 3) and batch.pixels.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == (batch.ids % 3).tolist()
    assert batch.valid.all() and (batch.epochs == 0).all()
    (batch,) = train(clips, DataConfig(size=32, frames=4), 1, batch=4)
    assert batch.pixels.shape == (4, 4, 32, 32, 3)


@pytest.mark.parametrize("kind", ["images", "clips"])
def test_starting_in_the_middle_gives_the_same_bytes(kind, request):
    catalogue = request.getfixturevalue(kind)
    view = DataConfig(size=32, frames=1 if kind == "images" else 4)
    whole = train(catalogue, view, 6)
    late = train(catalogue, view, 2, start_step=4)
    for a, b in zip(whole[4:], late, strict=True):
        assert torch.equal(a.pixels, b.pixels) and np.array_equal(a.ids, b.ids)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (4, 3)])
def test_the_global_batch_does_not_depend_on_how_it_is_divided(images, world, accumulate):
    view = DataConfig(size=32)
    whole = train(images, view, 3, start_step=1)
    split = [
        batch
        for rank in range(world)
        for batch in train(images, view, 3, start_step=1, rank=rank, world=world, accumulate=accumulate)
    ]
    whole, split = rows(whole), rows(split)
    assert whole.keys() == split.keys() and len(whole) == 36
    assert all(torch.equal(whole[key], split[key]) for key in whole)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_has_every_sample_once_and_ranks_have_equally_many_batches(images, world):
    runs = [evaluation(images, DataConfig(size=24), 4, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in runs}) == 1
    seen = np.concatenate([batch.ids[batch.valid] for batches in runs for batch in batches])
    assert np.array_equal(np.sort(seen), np.arange(len(images)))


def test_later_batches_do_not_overwrite_earlier_ones(images):
    batches = train(images, DataConfig(size=32), 60)
    again = train(images, DataConfig(size=32), 60)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(batches, again, strict=True))
    assert len({batch.pixels.data_ptr() for batch in batches}) == 60
    # A view of a batch keeps its memory too; memory without references is reused.
    first = iter(train(images, DataConfig(size=32), 1)[0].pixels)
    assert torch.equal(next(first), batches[0].pixels[0])
    batches = iter(train_loader(images, DataConfig(size=32)))
    held = [next(batches).pixels[3] for _ in range(5)]
    assert len({next(batches).pixels.data_ptr() for _ in range(20)}) <= 2
    assert all(torch.equal(row, batch.pixels[3]) for row, batch in zip(held, again, strict=False))


def test_later_batches_do_not_overwrite_frames_without_resampling(images):
    def views():
        view = DataConfig(size=72, crop=1.0)
        return evaluation(images, view, 4)

    for a, b in zip(views(), views(), strict=True):
        assert torch.equal(a.pixels, b.pixels) and a.pixels.float().std() > 20


def test_the_thread_count_follows_the_usable_cores(monkeypatch):
    assert sizing(CPU, 5).threads == 5 and sizing(CPU, 5).reason.startswith("5 decoding threads (as set)")
    monkeypatch.setattr(machine, "usable_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sizing(CPU).threads == 4 and sizing(torch.device("cuda")).threads == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert sizing(CPU).threads == 1


def test_decoded_pixels_equal_those_of_pillow(images):
    view = DataConfig(size=72, crop=1.0)  # the central 72 x 72 pixels of 96 x 72, not resampled
    (batch,) = evaluation(images, view, 30)
    for sample in range(30):
        pixels = Image.open(io.BytesIO(frame_bytes(images, sample, 0).tobytes())).crop((12, 0, 84, 72))
        gap = np.abs(batch.pixels[sample].numpy().astype(int) - np.asarray(pixels))
        assert gap.max() <= 8 and gap.mean() < 0.5  # chroma differs slightly at the border of the crop


@pytest.mark.parametrize("size", [20, 100])
@pytest.mark.parametrize(("ours", "pillows"), [("triangular", "BILINEAR"), ("cubic", "BICUBIC")])
def test_resampling_equals_that_of_pillow(tmp_path, size, ours, pillows):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    root = write_dataset(tmp_path / "d", [[jpeg(noise)]], "image")
    view = DataConfig(size=size, crop=1.0, interpolation=ours)
    (batch,) = evaluation(open_dataset(root, "train"), view, 1)
    pixels = Image.open(io.BytesIO(jpeg(noise))).resize((size, size), Image.Resampling[pillows])
    assert np.abs(batch.pixels[0].numpy().astype(int) - np.asarray(pixels)).max() <= 2


@pytest.mark.parametrize("kind", ["triangular", "linear", "cubic"])
@pytest.mark.parametrize(("repeats", "clip"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_resampling_inside_the_graph_gives_the_same_picture(images, clips, kind, repeats, clip):
    # The GPU's graph, run on the CPU, has the same crops, flips and order of rows as torch's path.
    catalogue = images if clip == 1 else clips
    settings = {"repeats": repeats, "same_clip": True, "scale": (0.3, 1.0), "interpolation": kind}
    view = DataConfig(size=40, frames=clip, **settings)
    _, ids = order.sample_at(np.arange(6), len(catalogue), seed=0)
    rows = train_rows(catalogue, view, 0, np.repeat(ids, repeats), np.arange(6 * repeats))
    outside, inside = (
        decoded(catalogue, view, rows, repeats, resize_on_cpu=inside).unflatten(0, (6 * repeats, clip))
        for inside in (False, True)
    )
    assert outside.shape == inside.shape == (6 * repeats, clip, 40, 40, 3)
    assert 0 < rows.flips.sum() < 6 * repeats
    gap = (outside.int() - inside.int()).abs().float()
    assert gap.mean() < 1 and gap.max() < 24


def decoded(dataset, config, rows, copies, **options) -> torch.Tensor:
    """The frames of these rows, uint8 [rows * T, H, W, 3]."""
    samples = len(rows.ids) // copies
    decoder = Decoder(config, DecodeConfig(threads=2), CPU, samples, copies, **options)
    decoder.feed(rows, dataset.read(rows.ids[::copies], rows.frames[::copies]))
    return decoder.take()[1].reshape(-1, config.size, config.size, 3)


def test_repeats_differ_and_share_frames_only_if_configured(clips):
    view = DataConfig(size=24, frames=4, repeats=3)
    (own,) = train(clips, view, 1, batch=21)
    (shared,) = train(clips, replace(view, same_clip=True), 1, batch=21)
    for batch in (own, shared):
        assert (batch.ids.reshape(-1, 3) == batch.ids[::3, None]).all()
        assert np.array_equal(batch.epochs.reshape(-1, 3), np.tile([0, 1, 2], (7, 1)))
    gray = [batch.pixels[:, :, 0, 0, 0].unflatten(0, (7, 3)).int() for batch in (own, shared)]
    assert (gray[1] - gray[1][:, :1]).abs().max() <= 1  # one clip for all three
    assert (gray[0] - gray[0][:, :1]).abs().max() > 8
    split = [train(clips, view, 1, batch=21, rank=rank, world=7)[0] for rank in range(7)]
    assert torch.equal(own.pixels, torch.cat([batch.pixels for batch in split]))


def test_repeats_of_an_image_equal_separate_decodes(images):
    view = DataConfig(size=32, repeats=4)
    (batch,) = train(images, view, 1, batch=12)
    assert all(not torch.equal(batch.pixels[0], batch.pixels[row]) for row in (1, 2, 3))
    alone = decoded(images, view, train_rows(images, view, 0, batch.ids, batch.epochs), 1)
    assert (batch.pixels.int() - alone.int()).abs().float().mean() < 0.5  # chroma differs at borders


def test_local_order_reads_the_same_samples(images):
    (batch,) = train(images, DataConfig(size=24, order="local", window=8), 1, batch=30)
    assert sorted(batch.ids) == list(range(30))


def test_augmented_batches_do_not_depend_on_how_they_are_divided(clips):
    view = DataConfig(size=24, frames=4, augment=Augment(layers=2, jitter=0.4, erase=0.5))
    whole = rows(train(clips, view, 3))
    split = rows([batch for rank in range(3) for batch in train(clips, view, 3, rank=rank, world=3)])
    plain = rows(train(clips, replace(view, augment=Augment()), 3))
    assert all(torch.equal(whole[key], split[key]) for key in whole)
    assert sum(torch.equal(whole[key], plain[key]) for key in whole) < 8  # black stays black


def test_pixels_have_the_crop_and_flip_of_their_row(images):
    view = DataConfig(size=40, scale=(0.3, 1.0))
    (batch,) = train(images, view, 1, batch=30)
    epochs, ids = order.sample_at(np.arange(30), len(images), seed=0)
    drawn = train_rows(images, view, 0, ids, epochs)
    assert 0 < drawn.flips.sum() < 30
    for row, (x, y, w, h) in enumerate(drawn.windows.tolist()):
        whole = Image.open(io.BytesIO(frame_bytes(images, int(drawn.ids[row]), 0).tobytes()))
        expected = whole.crop((x, y, x + w, y + h)).resize((40, 40), Image.Resampling.BILINEAR)
        if drawn.flips[row]:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.abs(batch.pixels[row].numpy().astype(int) - np.asarray(expected)).mean() < 1.5


def test_all_frames_of_a_clip_get_the_same_crop_and_flip(tmp_path):
    clips = [[jpeg(picture(64, 48, seed))] * 30 for seed in range(8)]
    catalogue = open_dataset(write_dataset(tmp_path / "d", clips, "video"), "train")
    (batch,) = train(catalogue, DataConfig(size=32, frames=8), 1, batch=8)
    assert (batch.pixels == batch.pixels[:, :1]).all()
    other = rows(train(catalogue, DataConfig(size=32, frames=8), 1, start_step=1, batch=8))
    assert any(not torch.equal(batch.pixels[row], other[1, int(batch.ids[row])]) for row in range(8))


def test_clips_have_the_frames_of_their_row(clips):
    # Frame k is a flat gray of level 2 k, so a pixel identifies its frame.
    (batch,) = evaluation(clips, DataConfig(size=16, frames=4), 7)
    frames = batch.pixels[:, :, 8, 8, 0].numpy() / 2
    short = [[0, 0, 0, 0], [0, 1, 2, 2], [1, 3, 5, 7], [3, 7, 11, 15]]
    assert np.abs(frames[:4] - short).max() <= 0.5
    assert np.abs(np.diff(frames[3:], axis=1) - 4).max() <= 1


def test_views_of_a_clip_are_consecutive_rows(clips):
    view = DataConfig(size=16, frames=4)
    first, last = evaluation(clips, view, 5, views=(2, 3))
    assert first.ids.tolist() == np.repeat(np.arange(5), 6).tolist()
    assert last.ids[last.valid].tolist() == np.repeat([5, 6], 6).tolist()
    frames = last.pixels[:12, :, 8, 8, 0].numpy() / 2
    assert np.abs(frames[6:9] - np.arange(0, 16, 4)).max() <= 0.5
    assert np.abs(frames[9:12] - np.arange(57, 70, 4)).max() <= 0.5


def test_short_clips_are_reported(clips):
    *_, note = clip_notes(clips, DataConfig(size=16, frames=16))
    assert note.startswith("5 of 7 train clips are shorter than 16 frames x stride 4 (61 frames)")
    assert clip_notes(clips, DataConfig(size=16, frames=1)) == []


def test_wrong_settings_give_one_line(images, clips):
    for catalogue, view, options, match in [
        (images, DataConfig(size=16, frames=4), {}, "contains image shards, but this run reads video input"),
        (clips, DataConfig(size=16), {}, "contains video shards, but this run reads image input"),
        (
            images,
            DataConfig(size=16),
            {"batch": 10, "world": 4},
            "a batch of 10 is not divisible by 4 processes",
        ),
    ]:
        with pytest.raises(UserError, match=match):
            train(catalogue, view, 1, **options)
    for settings, match in [
        (
            {"interpolation": "nearest"},
            r"data\.interpolation is 'nearest'; it can be triangular, cubic, linear",
        ),
        ({"order": "sorted"}, r"data\.order is 'sorted'; it can be random, local"),
        ({"clip_start": -1}, r"data\.clip_start is -1; it must be at least 0$"),
    ]:
        with pytest.raises(UserError, match=match):
            DataConfig(**settings)


def test_prefetching_keeps_the_order_and_raises_the_errors_of_its_source():
    def source():
        yield from range(5)
        raise UserError("WHAT; WHAT TO DO")

    items = prefetch(source(), depth=3)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="WHAT TO DO"):
        next(items)
    assert list(prefetch(iter(()), depth=3)) == [] and list(prefetch(iter([7]), depth=3)) == [7]


def test_an_abandoned_loader_ends_its_thread(images):
    before = set(threading.enumerate())  # loaders of other tests may still have theirs
    batches = iter(train_loader(images, DataConfig(size=32)))
    next(batches)
    (reader,) = (t for t in threading.enumerate() if t not in before and t.name.startswith("read"))
    batches.close()
    deadline = time.monotonic() + 10
    while reader.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation():
    clips = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8)
    for frames, pixels, stats in ((1, clips[:, 0], layers.IMAGE_STATS), (3, clips, layers.VIDEO_STATS)):
        model = layers.NormalizedInput(torch.nn.Identity(), frames)
        out = model(pixels)
        assert out.shape == (2, 3, *pixels.shape[1:-1]) and out.dtype == torch.float32
        for channel, (mean, std) in enumerate(zip(*stats, strict=True)):
            expected = (pixels[..., channel] / 255 - mean) / std
            torch.testing.assert_close(out[:, channel], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.restore(out), pixels.float(), atol=1e-3, rtol=0)
        assert model.state_dict() == {}
