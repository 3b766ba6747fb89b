"""One test for each fault of the small reference trainer from which this project started.

It could not train on several GPUs and did not save checkpoints: tests/train/test_runs.py compares two
processes with one, and kills and resumes runs.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.layers import NormalizedInput
from pipelines.dataset import Dataset, open_dataset
from pipelines.loader import Batch
from tests.train_helpers import CLASSES, picture, small
from tools.pack import ImageOptions, pack_images
from train import build, finetune, loop, mae
from train.config import Config
from train.distributed import World
from train.metrics import read_csv
from train.optim import make_optimizer, update
from train.rundir import Run
from train.task import Task, batches_of, create_classifier

ALONE = World(0, 1, torch.device("cpu"))


def training(config: Config, catalogue: Dataset, steps: int) -> Iterator[Batch]:
    """The first `steps` batches of a run with this configuration."""
    _, accumulate = build.micro_batches(config, 1)
    batches = build.training_batches(config, ALONE, catalogue, accumulate, 0)
    return (next(batches) for _ in range(steps * accumulate))


@pytest.fixture
def weights(images: Path, tmp_path: Path) -> Path:
    """Weights that were pretrained for a few steps."""
    config = small("image-mae-pico", images, tmp_path, "pretrained", epochs=0.5)
    assert loop.fit(config, mae.make_task) == 0
    return tmp_path / "pretrained" / "model.safetensors"


def test_every_epoch_has_another_order(images: Path, tmp_path: Path):
    config = small("image-mae-pico", images, tmp_path, "order", batch=8)
    seen = [batch.ids for batch in training(config, open_dataset(images, "train"), steps=10)]
    first, second = np.concatenate(seen).reshape(2, 40)
    assert sorted(first) == sorted(second) == list(range(40))
    assert not np.array_equal(first, np.sort(first)) and not np.array_equal(first, second)


@pytest.mark.parametrize("preset", ["image-ft-pico", "video-ft-pico"])
def test_training_is_augmented_and_evaluation_is_not(images: Path, clips: Path, tmp_path: Path, preset: str):
    data = clips if "video" in preset else images
    config = small(preset, data, tmp_path, "augmented", batch=4)
    catalogue = open_dataset(data, "train")
    looks: dict[int, list[torch.Tensor]] = {}
    for batch in training(config, catalogue, steps=len(catalogue) // 4 * 2):
        for sample, pixels in zip(batch.ids.tolist(), batch.pixels, strict=True):
            looks.setdefault(sample, []).append(pixels)
    assert all(len(pair) == 2 and not torch.equal(*pair) for pair in looks.values())
    validation = open_dataset(data, "val")
    twice = [[b.pixels for b in batches_of(config, ALONE, validation, (1, 1))] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_accumulated_gradients_are_averaged(images: Path, tmp_path: Path):
    """A batch in one piece and in four gives equal gradients; a sum would be four times as large."""
    norms = []
    for micro in (12, 3):
        config = small("image-ft-pico", images, tmp_path, "summed")
        config = replace(config, speed=replace(config.speed, micro_batch=micro))
        torch.manual_seed(0)
        catalogue = open_dataset(images, "train")
        task = finetune.make_task(config, Run(ALONE))
        batches = training(config, catalogue, steps=1)
        model = NormalizedInput(task.model, 1)
        loop._accumulate(model, task, batches, 12 // micro, torch.enable_grad)
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert norms[0] > 0
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)


def test_norms_biases_and_positions_have_no_weight_decay(images: Path, tmp_path: Path):
    """With zero gradients, a step changes only the weights with weight decay."""
    config = small("image-ft-pico", images, tmp_path, "decay", weight_decay=0.1)
    model = create_classifier(config.data, config.model, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    update(model, make_optimizer(model, config.optim), 0.0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    matrices = {name for name, p in before.items() if p.ndim > 1 and "pos_embed" not in name}
    assert moved == matrices


def test_evaluation_uses_the_validation_samples(tmp_path: Path):
    """The validation pictures have wrong labels: evaluating training pictures would give about 1."""
    for split, count in (("train", 20), ("val", 8)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                shown = label if split == "train" else 1 - label
                (folder / f"{number}.JPEG").write_bytes(picture(shown, 100 * label + number))
    assert pack_images(tmp_path / "source", tmp_path / "images", ImageOptions(workers=1)) == 0
    config = small("image-ft-pico", tmp_path / "images", tmp_path, "held-out", epochs=6.0, lr=2e-3)
    loop.fit(config, finetune.make_task)
    assert read_csv(tmp_path / "held-out" / "metrics.csv")[-1]["acc"] < 0.1


def test_loaded_weights_are_trained(images: Path, tmp_path: Path, weights: Path):
    config = small("image-ft-pico", images, tmp_path, "tuned", epochs=1.0)
    loop.fit(replace(config, model=replace(config.model, init=str(weights))), finetune.make_task)
    before, after = load_file(weights), load_file(tmp_path / "tuned" / "model.safetensors")
    shared = before.keys() & after.keys()
    assert len(shared) > 40
    assert [name for name in shared if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(
    ("preset", "mean", "deviation"),
    [
        ("image-mae-base", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("video-mae-base", (0.45,) * 3, (0.225,) * 3),
    ],
)
def test_images_and_clips_are_normalized_by_their_own_statistics(preset, mean, deviation):
    frames = loop_frames(preset)
    shape = (1, 8, 8, 3) if frames == 1 else (1, frames, 8, 8, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    found = NormalizedInput(nn.Identity(), frames)(pixels)
    torch.testing.assert_close(found, expected.movedim(-1, 1).float(), rtol=1e-5, atol=1e-5)


def loop_frames(preset: str) -> int:
    """Frames of a preset; they decide which statistics are used."""
    from train.presets import MAE_PRESETS

    return MAE_PRESETS[preset].data.frames


def test_pretraining_continues_after_a_non_finite_step(images: Path, tmp_path: Path):
    """MAE training was unstable there: here a step that is not finite is skipped and reported."""
    config = small("image-mae-pico", images, tmp_path, "unstable", epochs=3.0)

    def make_task(*arguments) -> Task:
        task, calls = mae.make_task(*arguments), iter(range(1000))

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            return task.loss(model, batch) * (float("inf") if next(calls) == 7 else 1.0)

        return replace(task, loss=loss)

    assert loop.fit(config, make_task) == 0
    rows = read_csv(tmp_path / "unstable" / "metrics.csv")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 1][: len(rows)]
    assert all(np.isfinite(row["loss_train"]) for row in rows)
    assert all(
        value.isfinite().all() for value in load_file(tmp_path / "unstable/model.safetensors").values()
    )
    assert "1 steps skipped" in (tmp_path / "unstable" / "log.txt").read_text()
