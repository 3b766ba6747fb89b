"""The demo's data: the same files on every run, and clips whose class is not visible in one frame."""

import csv
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train_helpers import ROOT
from tools import demo_data as demo
from tools.pack import ClipOptions, ImageOptions, pack_clips, pack_images

LABELS = sorted(demo.MOTIONS)
TRAIN, VAL = 60, 50  # clips a class


DRAW = """
import multiprocessing, sys
from pathlib import Path
from tools import demo_data as demo
demo.IMAGES = demo.CLIPS = {"train": 2, "val": 1}
demo.get_context = lambda _: multiprocessing.get_context("fork")  # workers take over the smaller counts
demo.demo_data(Path(sys.argv[1]), int(sys.argv[2]))
"""


def draw_some(out: Path, workers: int) -> Path:
    """A few pictures and clips of each class, drawn in a process without threads, which may fork."""
    subprocess.run([sys.executable, "-c", DRAW, str(out), str(workers)], cwd=ROOT, check=True, timeout=120)
    return out


def sums(out: Path) -> dict[str, str]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_files_do_not_depend_on_the_workers_and_all_differ(tmp_path):
    one = sums(draw_some(tmp_path / "1", 1))
    assert one == sums(draw_some(tmp_path / "2", 2))
    pictures = [digest for path, digest in one.items() if path.startswith("images")]
    assert len(pictures) == len(set(pictures)) == 3 * len(demo.PICTURE_CLASSES)


def test_the_folders_have_the_published_layout_and_are_packed_completely(tmp_path):
    root = draw_some(tmp_path / "demo", 2)
    clips = root / "clips"
    assert sorted(path.name for path in (root / "images").iterdir()) == ["train", "val"]
    with (clips / "annotations/tiny_train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"]
    assert {row["label"] for row in rows} == set(LABELS) and any(" " in label for label in LABELS)
    assert {row["youtube_id"][0] for row in rows} == {"-", "_"}
    assert pack_images(root / "images", tmp_path / "images", ImageOptions(workers=1, max_reject=0.0)) == 0
    options, frames = ClipOptions(workers=1, max_reject=0.0), clips / "data_30fps_frames"
    assert pack_clips(clips / "annotations", tmp_path / "clips", options, frames=frames) == 0


def test_a_clip_is_drawn_from_its_own_seed():
    first, again, other = (demo.draw_clip(np.random.default_rng(seed), LABELS[0]) for seed in (1, 1, 2))
    assert first.shape == (demo.CLIP_FRAMES, demo.CLIP_SIDE, demo.CLIP_SIDE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# ---- what one frame tells, and what two tell -------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two frames, four apart, of every clip [clips, 2, side, side, 3], labels, and which are for training."""
    frames, labels, training = [], [], []
    for number in range(TRAIN + VAL):
        for label, name in enumerate(LABELS):
            draw = np.random.default_rng([number, label])
            clip = demo.draw_clip(draw, name)
            at = draw.integers(0, len(clip) - 4)
            frames.append(clip[[at, at + 4]])
            labels.append(label)
            training.append(number < TRAIN)
    return np.stack(frames), np.array(labels), np.array(training)


def chance_at_most() -> float:
    """What a guesser reaches with a probability of 0.9997: chance and 3.4 standard deviations."""
    chance = 1 / len(LABELS)
    return chance + 3.4 * np.sqrt(chance * (1 - chance) / (VAL * len(LABELS)))


def small_pictures(frames: np.ndarray) -> np.ndarray:
    """[n, 80, 80, 3] -> [n, 300]: each frame as 10 x 10 pixels, in 0..1."""
    scaled = [Image.fromarray(frame).resize((10, 10), Image.Resampling.BOX) for frame in frames]
    return np.stack([np.asarray(picture) for picture in scaled]).reshape(len(frames), -1) / 255


def color_histograms(frames: np.ndarray) -> np.ndarray:
    """[n, 80, 80, 3] -> [n, 64]: the share of each of 4 x 4 x 4 colors."""
    bins = (frames // 64).astype(int) @ np.array([16, 4, 1])
    return np.stack([np.bincount(each.ravel(), minlength=64) for each in bins]) / bins[0].size


def textures(frames: np.ndarray) -> np.ndarray:
    """[n, 80, 80, 3] -> [n, 12]: the steps between neighbors, down and across."""
    values = frames.astype(float)
    steps = [np.abs(np.diff(values, axis=axis)) for axis in (1, 2)]
    return np.concatenate([part(step, axis=(1, 2)) for step in steps for part in (np.mean, np.std)], 1)


def nearest_centroid(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    centroids = np.stack([x[y == label].mean(0) for label in range(len(LABELS))])
    return ((other[:, None] - centroids) ** 2).sum(-1).argmin(1)


def logistic_regression(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Softmax regression by gradient descent with weight decay; predictions for `other`."""
    mean, deviation = x.mean(0), x.std(0) + 1e-9
    x, other = (np.pad((part - mean) / deviation, ((0, 0), (0, 1)), constant_values=1) for part in (x, other))
    weights = np.zeros((x.shape[1], len(LABELS)))
    for _ in range(300):
        scores = np.exp(x @ weights - (x @ weights).max(1, keepdims=True))
        error = scores / scores.sum(1, keepdims=True) - np.eye(len(LABELS))[y]
        weights -= 0.1 * (x.T @ error / len(x) + 0.01 * weights)
    return (other @ weights).argmax(1)


@pytest.mark.parametrize("classify", [nearest_centroid, logistic_regression])
@pytest.mark.parametrize("features", [small_pictures, color_histograms, textures])
def test_one_frame_does_not_show_the_class(pairs, features, classify):
    frames, labels, training = pairs
    x = features(frames[:, 0])
    guessed = classify(x[training], labels[training], x[~training])
    assert (guessed == labels[~training]).mean() < chance_at_most()


def test_the_same_classifiers_find_a_visible_class(pairs):
    """The tests above can fail: a class a little brighter than the rest is found at once."""
    frames, labels, training = pairs
    x = small_pictures(frames[:, 0]).mean(1, keepdims=True) + 0.2 * labels[:, None]
    guessed = nearest_centroid(x[training], labels[training], x[~training])
    assert (guessed == labels[~training]).mean() > 1.5 * chance_at_most()


def test_two_frames_show_more_than_one(pairs):
    """Two frames tell whether it rested, drifted or hopped; how often it hops takes more of them."""
    frames, labels, training = pairs
    x = np.stack([two_frame_features(*pair.astype(float)) for pair in frames])
    guessed = nearest_centroid(x[training], labels[training], x[~training])
    assert (guessed == labels[~training]).mean() > 1.5 * chance_at_most()


def two_frame_features(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether the picture moved at all, and whether it moved no further than a drift does."""
    spectrum = np.conj(np.fft.fft2(first.sum(-1))) * np.fft.fft2(second.sum(-1))
    peak = np.fft.ifft2(spectrum / (np.abs(spectrum) + 1e-9)).real.argmax()
    side = len(first)
    moved = (np.array(np.unravel_index(peak, (side, side))) + side // 2) % side - side // 2
    return np.array([moved.any(), 0 < np.hypot(*moved) < 10], float)
