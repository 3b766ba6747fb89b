"""The frames of a clip: the recipe's stride at the dataset's frame rate, and segments."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipelines import order
from pipelines.config import DataConfig
from pipelines.dataset import Dataset, open_dataset, read_info
from pipelines.errors import UserError
from pipelines.views import check_info, clip_notes, eval_rows, rounded, train_rows
from tests.pipelines_fixtures import clip_dataset, evaluation
from tests.train_helpers import make_clips, small
from tools.pack import ClipOptions, pack_clips
from tools.predict import pack as pack_inputs
from train import build, evaluate, finetune, loop
from train.metrics import read_csv
from train.task import open_validation

LENGTHS = [125, 120, 70, 61, 60, 40, 20, 16, 9, 3, 1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return clip_dataset(tmp_path_factory.mktemp("clips") / "clips", LENGTHS, size=(16, 16))


def at(dataset: Path, fps: float | None) -> Dataset:
    """The dataset as if it had been packed at `fps` frames per second."""
    catalogue = open_dataset(dataset, "train")
    packing = {} if fps is None else {"fps": fps}
    return replace(catalogue, info=replace(catalogue.info, packing=packing))


def trained(catalogue: Dataset, view: DataConfig, epochs: int = 1) -> np.ndarray:
    """The frames of every sample in training, [n * epochs, T]."""
    ids = np.tile(np.arange(len(catalogue)), epochs)
    return train_rows(catalogue, view, 5, ids, np.arange(len(ids)) // len(catalogue)).frames


def evaluated(catalogue: Dataset, view: DataConfig, temporal: int = 1) -> np.ndarray:
    ids = np.arange(len(catalogue))
    return eval_rows(catalogue, view, (temporal, 1), ids, ids >= 0).frames


# ---- stride in time --------------------------------------------------------------------------------------


def test_clips_at_ten_frames_per_second_span_the_recipes_time(dataset):
    """Regression: stride 4 at 10 fps was 0.4 s between frames, three times the recipe's 0.133 s."""
    view = DataConfig(size=16, frames=16)
    frames = trained(at(dataset, 10.0), view)[LENGTHS.index(125)]
    assert (frames[-1] - frames[0]) / 10 == pytest.approx(15 * 4 / 30)
    assert set(np.diff(frames)) == {1, 2}


@pytest.mark.parametrize(
    ("fps", "stride", "offsets"),
    [
        (30.0, 4, [0, 4, 8, 12, 16, 20, 24, 28]),
        (60.0, 4, [0, 8, 16, 24, 32, 40, 48, 56]),
        (15.0, 4, [0, 2, 4, 6, 8, 10, 12, 14]),
        (7.5, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (10.0, 4, [0, 1, 3, 4, 5, 7, 8, 9]),  # 4/3
        (12.0, 4, [0, 2, 3, 5, 6, 8, 10, 11]),  # 1.6
        (25.0, 3, [0, 3, 5, 8, 10, 13, 15, 18]),  # 2.5; halves are rounded up
        (29.97, 4, [0, 4, 8, 12, 16, 20, 24, 28]),
    ],
)
def test_frames_follow_the_converted_stride_with_halves_rounded_up(dataset, fps, stride, offsets):
    view, catalogue = DataConfig(size=16, frames=8, stride=stride), at(dataset, fps)
    long = [index for index, length in enumerate(LENGTHS) if length > offsets[-1]]
    for frames in (trained(catalogue, view)[long], evaluated(catalogue, view)[long]):
        assert (frames - frames[:, :1] == offsets).all()
    starts = trained(catalogue, view, epochs=3000).reshape(3000, -1, 8)[:, LENGTHS.index(70), 0]
    assert set(starts) == set(range(70 - offsets[-1])), "every start that fits is drawn, no other"
    ends = evaluated(catalogue, view, temporal=5).reshape(len(LENGTHS), 5, 8)[long]
    assert (ends[:, 0, 0] == 0).all() and (ends[:, -1, -1] == np.array(LENGTHS)[long] - 1).all()
    fixed = trained(catalogue, replace(view, clip_start=10))[LENGTHS.index(125)]
    assert fixed[0] == rounded(10 * Fraction(str(fps)) / 30) and (fixed - fixed[0] == offsets).all()


def old_frames(draws: np.ndarray, counts: np.ndarray, frames: int, stride: int) -> np.ndarray:
    """Frames of a random window before strides were converted, as an independent formula."""
    rows = []
    for draw, count in zip(draws, counts, strict=True):
        own = min(max((count - 1) // max(1, frames - 1), 1), stride)
        start = int(draw * (max(0, count - 1 - (frames - 1) * own) + 1))
        rows.append([min(start + k * own, count - 1) for k in range(frames)])
    return np.array(rows)


@pytest.mark.parametrize(
    ("stride", "fps", "stored"), [(4, 30.0, 4), (4, None, 4), (2, 30.0, 2), (4, 15.0, 2)]
)
def test_integer_strides_give_the_same_frames_as_before_conversion(dataset, stride, fps, stored):
    counts, ids = np.array(LENGTHS), np.arange(len(LENGTHS))
    view = DataConfig(size=16, frames=16, stride=stride)
    draws = order.uniform(5, np.zeros_like(ids), ids, order.STREAM_START, 1)[:, 0]
    assert np.array_equal(trained(at(dataset, fps), view), old_frames(draws, counts, 16, stored))


def test_short_clips_shrink_a_converted_stride_to_whole_numbers(dataset):
    view, catalogue = DataConfig(size=16, frames=16), at(dataset, 12.0)  # 1.6: 25 frames are needed
    found = dict(zip(LENGTHS, evaluated(catalogue, view), strict=True))
    assert found[40][-1] - found[40][0] == 24
    assert found[20].tolist() == list(range(2, 18)) and found[9].tolist() == [*range(9), *[8] * 7]
    (rate, short) = clip_notes(catalogue, view)
    assert "stride 4 at 30 frames per second is stride 1.6 at the dataset's 12, each rounded" in rate
    assert "0.133 s from frame to frame, 2.13 s for 16" in rate
    assert short.startswith("5 of 11 train clips are shorter than 16 frames x stride 1.6 (25 frames)")


def test_the_conversion_is_logged_if_the_rates_differ_or_are_unknown(dataset):
    view = DataConfig(size=16, frames=3)
    assert not any("frames per second" in note for note in clip_notes(at(dataset, 30.0), view))
    assert "at the dataset's 60: " in clip_notes(at(dataset, 60.0), view)[0]
    assert "dataset's 30 (assumed: none is recorded): 0.133 s" in clip_notes(at(dataset, None), view)[0]
    assert clip_notes(at(dataset, None), DataConfig(size=16)) == []


def test_impossible_strides_are_refused_before_reading(dataset, tmp_path):
    words = r"7 frames per second, and stride 4 at 30 would be 0\.933 of its frames; pack it at 7\.5 or more"
    with pytest.raises(UserError, match=words + r" \(--fps\), or set data\.stride to 5$"):
        check_info(at(dataset, 7.0).info, DataConfig(size=16, frames=4))
    with pytest.raises(UserError, match=words):
        evaluation(at(dataset, 7.0), DataConfig(size=16, frames=4), 2)
    check_info(at(dataset, 7.0).info, DataConfig(size=16, frames=4, stride=5))
    copy = tmp_path / "slow"
    shutil.copytree(dataset, copy)
    info = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(info | {"packing": {"fps": 7.0}}))
    with pytest.raises(UserError, match=r"7 frames per second, and stride 2 at 30 would be 0\.467 "):
        build.check(small("video-ft-pico", copy, tmp_path, "run"))
    for wrong in (0, -1, "30", True, [30], 1e9, float("nan")):
        (copy / "dataset.json").write_text(json.dumps(info | {"packing": {"fps": wrong}}))
        with pytest.raises(UserError, match="is damaged"):
            read_info(copy)


def test_training_evaluation_and_prediction_use_the_packed_frame_rate(tmp_path, capsys):
    """Folders of frames at 30 fps packed with --fps 7.5: stride 4 is stride 1, to a finished run."""
    clips = make_clips(tmp_path, train=4, val=2, frames=40)
    assert read_info(clips).packing["fps"] == 30.0
    folders = {"frames": tmp_path / "frames", "annotations": tmp_path / "annotations"}
    slow, options = tmp_path / "slow", ClipOptions(workers=1, shard_size=8, fps=7.5)
    assert pack_clips(out=slow, options=options, **folders) == 0
    with pytest.raises(UserError, match=r"packed with fps 7\.5, not 30\.0"):
        pack_clips(out=slow, options=replace(options, fps=30.0), **folders)
    assert (open_dataset(slow, "train").frame_counts(np.arange(4)) == 10).all()
    config = small("video-ft-pico", slow, tmp_path, "run", epochs=1.0)
    config = replace(config, data=replace(config.data, stride=4))
    build.check(config)
    assert loop.fit(config, finetune.make_task) == 0
    note = "stride 4 at 30 frames per second is stride 1 at the dataset's 7.5: 0.133 s from frame to frame"
    assert note in (tmp_path / "run" / "log.txt").read_text()
    capsys.readouterr()
    evaluate.evaluate(evaluate.Arguments(tmp_path / "run", device="cpu"))
    assert note in capsys.readouterr().out
    inputs = sorted(path for path in (tmp_path / "frames").glob("*/*") if "val" in path.name)
    out = tmp_path / "inputs"
    out.mkdir()
    assert pack_inputs(config, inputs, read_info(slow).packing, out)[1] == [""] * len(inputs)
    given, known = open_dataset(out, "val"), open_validation(config.data)
    assert given.info.fps == 7.5 and known is not None
    view = config.data
    assert np.array_equal(evaluated(given, view), evaluated(known, view))


def test_folders_packed_without_a_frame_rate_can_be_packed_again(tmp_path):
    clips = make_clips(tmp_path, train=2, val=1)
    info = json.loads((clips / "dataset.json").read_text())
    del info["packing"]["fps"]
    (clips / "dataset.json").write_text(json.dumps(info))
    folders = {"frames": tmp_path / "frames", "annotations": tmp_path / "annotations"}
    options = ClipOptions(workers=1, shard_size=8)
    assert pack_clips(out=clips, options=options, **folders) == 0
    with pytest.raises(UserError, match=r"packed with fps 30\.0, not 12\.0"):
        pack_clips(out=clips, options=replace(options, fps=12.0), **folders)


# ---- segments --------------------------------------------------------------------------------------------


def test_segments_draw_one_frame_per_part_and_evaluate_its_middle(dataset):
    view, catalogue = DataConfig(size=16, frames=8, sampling="segments"), at(dataset, 12.0)
    drawn = trained(catalogue, view, epochs=4000).reshape(4000, -1, 8)
    for index, length in enumerate(LENGTHS):
        frames = drawn[:, index]
        assert frames.min() >= 0 and frames.max() < length and (np.diff(frames, axis=1) >= 0).all()
    parts = drawn[:, LENGTHS.index(120)]  # 15 frames in each part
    assert (parts // 15 == np.arange(8)).all()
    counts = np.stack([np.bincount(parts[:, k] - 15 * k, minlength=15) for k in range(8)])
    assert (np.abs(counts - 4000 / 15) < 5 * np.sqrt(4000 / 15)).all(), "uniform within the part"
    within = (parts - 15 * np.arange(8)) / 15
    assert np.abs(np.corrcoef(within.T) - np.eye(8)).max() < 0.08, "each part is drawn by itself"
    found = dict(zip(LENGTHS, evaluated(catalogue, view), strict=True))
    assert found[120].tolist() == [7, 22, 37, 52, 67, 82, 97, 112]
    assert found[16].tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert found[20].tolist() == [1, 3, 6, 8, 11, 13, 16, 18]  # rounded down from 1.25, 3.75, 6.25, ...
    assert found[3].tolist() == [0, 0, 0, 1, 1, 2, 2, 2] and found[1].tolist() == [0] * 8


def test_segments_need_no_frame_rate_and_have_one_view_in_time(dataset, tmp_path):
    view = DataConfig(size=16, frames=8, sampling="segments")
    assert np.array_equal(trained(at(dataset, 1.0), view), trained(at(dataset, None), view))
    check_info(at(dataset, 1.0).info, view)
    assert clip_notes(at(dataset, 12.0), view) == [
        "2 of 11 train clips are shorter than 8 frames: some of their frames repeat"
    ]
    batches = evaluation(at(dataset, 12.0), view, 2, views=(1, 3))
    pixels = batches[0].pixels[:3, :, 8, 8, 0].numpy() / 2
    assert np.abs(pixels - (2 * np.arange(8) + 1) * 125 // 16).max() <= 0.5  # the same in three spatial views
    config = small("video-ft-pico", dataset, tmp_path, "run")
    config = replace(config, data=replace(config.data, sampling="segments"), views=(5, 3))
    with pytest.raises(UserError, match="one temporal view, not 5; set --views 1 3"):
        build.check(config)
    with pytest.raises(UserError, match="one temporal view, not 5"):
        evaluation(at(dataset, 12.0), view, 2, views=(5, 1))
    with pytest.raises(UserError, match=r"data\.sampling is 'segment'; it can be stride, segments"):
        replace(config.data, sampling="segment")


def test_repeats_of_one_clip_share_their_segments(dataset):
    view = DataConfig(size=16, frames=4, sampling="segments", repeats=2, same_clip=True)
    ids = np.repeat(np.arange(len(LENGTHS)), 2)
    frames = train_rows(at(dataset, 12.0), view, 5, ids, np.tile([6, 7], len(LENGTHS))).frames
    assert np.array_equal(frames[::2], frames[1::2])


def test_a_run_with_segments_trains_with_sgd_and_evaluates_three_views(tmp_path):
    clips = make_clips(tmp_path, train=3, val=1)
    config = small("video-ft-pico", clips, tmp_path, "run", epochs=2.0)
    config = replace(config, optim=replace(config.optim, name="sgd"), views=(1, 3))
    config = replace(config, data=replace(config.data, sampling="segments", flip=0.0))
    build.check(config)
    assert loop.fit(config, finetune.make_task) == 0
    row = read_csv(tmp_path / "run" / "metrics.csv")[-1]
    assert row["step"] == 1 and row["skipped"] == 0 and np.isfinite(row["loss"])
