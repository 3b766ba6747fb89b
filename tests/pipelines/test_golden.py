"""Batches have the committed digests: a change of any row or pixel fails here.

After a change that is meant to alter them: UPDATE_GOLDEN=1 python -m pytest tests/pipelines/test_golden.py
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import Augment, DataConfig, DecodeConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.loader import Batch, EvalLoader, TrainLoader
from pipelines.machine import World
from tests.pipelines_fixtures import jpeg, picture, write_dataset

CPU = torch.device("cpu")
GOLDEN = Path(__file__).with_name("golden_batches.json")
LENGTHS = (3, 9, 20, 33, 40, 64, 70, 25, 1, 50)  # frames of each clip
SIZES = ((96, 72), (72, 96), (64, 64), (120, 50))  # pixels of the images, in turn
SEED = 5
DAMAGED = 17


@dataclass(frozen=True)
class Case:
    """Batches of one kind, from `world` processes one after another."""

    kind: str = "images"
    settings: dict[str, object] = field(default_factory=dict)  # of DataConfig
    batch: int = 12  # rows of a step in all processes; in evaluation, samples of one process
    world: int = 1
    accumulate: int = 1
    views: tuple[int, int] | None = None  # temporal x spatial views of an evaluation; None: training


CLIPS = {"size": 32, "frames": 4}
LIGHT = {"scale": (0.3, 1.0), "interpolation": "cubic"}
CASES = {
    "images": Case(),
    "images, two processes, two micro batches": Case(world=2, accumulate=2),
    "images, one damaged": Case("damaged"),
    "images, one damaged, repeats": Case("damaged", {"repeats": 2}),
    "images, repeats, cubic": Case(settings={"repeats": 3} | LIGHT),
    "images, local order": Case(settings={"order": "local", "window": 8}),
    "images, augmented": Case(
        settings={"augment": Augment(layers=2, jitter=0.4, erase=0.5), "interpolation": "linear"}
    ),
    "clips": Case("clips", CLIPS, batch=6),
    "clips, two processes": Case("clips", CLIPS, batch=6, world=2),
    "clips, another frame rate": Case("clips", CLIPS | {"stride": 7, "stride_fps": 25.0}, batch=6),
    "clips, segments": Case("clips", CLIPS | {"sampling": "segments"}, batch=6),
    "clips, repeats": Case("clips", CLIPS | {"repeats": 2}, batch=6),
    "clips, repeats of one clip": Case("clips", CLIPS | {"repeats": 2, "same_clip": True}, batch=6),
    "clips, augmented": Case("clips", CLIPS | {"augment": Augment(layers=1, jitter=0.3, erase=0.5)}, batch=6),
    "clips, from frame 10": Case("clips", CLIPS | {"clip_start": 10}, batch=6),
    "evaluation of images": Case(views=(1, 1)),
    "evaluation of images, three views, two processes": Case(views=(1, 3), world=2, batch=7),
    "evaluation of images, one damaged": Case("damaged", views=(1, 1)),
    "evaluation of clips": Case("clips", CLIPS, views=(1, 1), batch=4),
    "evaluation of clips, nine views": Case("clips", CLIPS, views=(3, 3), batch=2, world=2),
    "evaluation of clips, segments": Case("clips", CLIPS | {"sampling": "segments"}, views=(1, 3), batch=2),
    "evaluation of clips, from frame 40": Case(
        "clips", CLIPS | {"eval_clip_start": 40}, views=(1, 1), batch=5
    ),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Dataset]:
    """Images, the same images with a damaged one, and clips with motion."""
    root = tmp_path_factory.mktemp("golden")
    images = [[jpeg(picture(*SIZES[seed % len(SIZES)], seed))] for seed in range(30)]
    clips = [
        [jpeg(np.roll(picture(64, 48, 100 + number), 3 * frame, axis=1)) for frame in range(length)]
        for number, length in enumerate(LENGTHS)
    ]
    packed = {
        "images": write_dataset(root / "images", images, "image"),
        "damaged": write_dataset(root / "damaged", images, "image"),
        "clips": write_dataset(root / "clips", clips, "video"),
    }
    found = {kind: open_dataset(folder, "train") for kind, folder in packed.items()}
    damaged = found["damaged"]
    with damaged.tar_path(int(damaged.shard[DAMAGED])).open("r+b") as tar:
        tar.seek(int(damaged.offset[DAMAGED]))
        tar.write(b"\0" * 100)
    return found


def batches_of(case: Case, dataset: Dataset, rank: int) -> Iterable[Batch]:
    """One process's batches: five steps of training, or a whole evaluation."""
    config = DataConfig(**{"size": 32, "max_bad": 0.1} | case.settings)
    parts = (dataset, config, DecodeConfig(threads=2), World(rank, case.world, CPU))
    if case.views:
        return EvalLoader(*parts, samples=case.batch, views=case.views)
    steps = {"batch": case.batch, "accumulate": case.accumulate, "start_step": 2}
    return itertools.islice(TrainLoader(*parts, seed=SEED, **steps), 5 * case.accumulate)


def columns_of(batch: Batch) -> list[np.ndarray]:
    """The labels of a batch, and its rows as they were decided before decoding."""
    rows = batch.rows
    columns = (rows.ids, rows.epochs, rows.positions, rows.valid, batch.bad, batch.labels.numpy())
    return [*map(np.asarray, columns), rows.frames, rows.windows, rows.flips]


def digest(arrays: Iterable[np.ndarray]) -> str:
    """A digest of integers; it is the same on every machine."""
    summed = hashlib.sha256()
    for array in arrays:
        summed.update(np.asarray(array.shape, "<i8").tobytes() + array.astype("<i8").tobytes())
    return summed.hexdigest()[:16]


@pytest.mark.parametrize("name", CASES)
def test_batches_have_the_committed_digests(name, datasets):
    case, dataset = CASES[name], datasets[CASES[name].kind]
    batches = [batch for rank in range(case.world) for batch in batches_of(case, dataset, rank)]
    found = {
        "rows": digest(column for batch in batches for column in columns_of(batch)),
        "pixels": hashlib.sha256(b"".join(b.pixels.numpy().tobytes() for b in batches)).hexdigest()[:16],
    }
    # Another JPEG library or another processor may give other pixels without a change of the code.
    every = np.arange(len(dataset))
    jpegs = b"".join(jpeg.tobytes() for jpeg in dataset.read(every, np.zeros((len(every), 1), np.int64)))
    machine = {
        "jpegs": hashlib.sha256(jpegs).hexdigest()[:16],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if os.environ.get("UPDATE_GOLDEN"):
        kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(kept | {name: found | machine}, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())[name]
    assert found["rows"] == expected["rows"]
    if machine.items() <= expected.items():
        assert found["pixels"] == expected["pixels"]
