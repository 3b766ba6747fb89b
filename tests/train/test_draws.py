"""Every random draw of a training step depends only on (seed, step or epoch, sample)."""

import random
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.data import mixup as timm_mixup
from torch._dynamo.testing import CompileCounter

from models.layers import NormalizedInput
from pipelines.config import Augment
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from pipelines.loader import blank_batch
from tests import LONG
from tests.fault_helpers import two_ranks
from tests.train_helpers import small
from train import build, finetune, loop, mae
from train.config import Config, FinetuneConfig
from train.distributed import World
from train.rundir import Run

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def everything_on(preset: str, data: Path, runs: Path) -> FinetuneConfig:
    """Ten steps of 8 rows with mixup, cutmix, drop path, dropout, RandAugment and random erasing."""
    samples, video = len(open_dataset(data, "train")), "video" in preset
    # Adam amplifies the rounding noise of tiny gradients to the learning rate, so the rate is small here.
    values = {"epochs": 80 / samples, "batch": 8, "lr_batch": 8, "warmup_epochs": 0.1, "lr": 1e-4}
    config = small(preset, data, runs, "one", **values)
    shape = {"size": 32, "frames": 4 if video else 1, "repeats": 2 if video else 1, "same_clip": video}
    shape["augment"] = Augment(layers=2, erase=0.25)
    assert isinstance(config, FinetuneConfig)
    return replace(
        config,
        data=replace(config.data, **shape),
        model=replace(config.model, drop_path=0.4, dropout=0.5),
        run=replace(config.run, log_every=10, eval_every=10),
        speed=replace(config.speed, micro_batch=8),
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
    )


@pytest.mark.parametrize("preset", ["image-ft-pico", pytest.param("video-ft-pico", marks=LONG)])
def test_finetuning_does_not_depend_on_processes_and_micro_batches(
    preset: str, images: Path, clips: Path, tmp_path: Path
):
    """The weights are equal after ten steps with all random augmentation and regularization."""
    one = everything_on(preset, clips if "video" in preset else images, tmp_path)
    split = replace(one, run=replace(one.run, name="split"), speed=replace(one.speed, micro_batch=4))
    two = replace(split, run=replace(one.run, name="two"))
    for config in (one, split):
        assert loop.fit(config, finetune.make_task) == 0
    codes, printed = two_ranks(two, two)
    assert codes == [0, 0], printed
    assert "1 processes x 4 micro x 2 accumulated" in (tmp_path / "split/log.txt").read_text()
    assert "2 processes x 4 micro x 1 accumulated" in printed
    worst = {name: differences(tmp_path / "one", tmp_path / name) for name in ("split", "two")}
    assert all(max(found.values()) <= 1e-5 for found in worst.values()), {
        name: max((value, key) for key, value in found.items()) for name, found in worst.items()
    }


def differences(run: Path, other: Path) -> dict[str, float]:
    """The largest absolute difference between the weights of two runs, per tensor."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, other))
    found = {}
    for name, value in ours.items():
        pair = (value, theirs[name])
        if name.endswith("attn.qkv.bias"):
            # Softmax ignores the key's bias: its gradient is rounding noise, which Adam amplifies.
            pair = tuple(x.view(3, -1)[[0, 2]] for x in pair)
        found[name] = (pair[0] - pair[1]).abs().max().item()
    return found


@pytest.mark.parametrize("preset", ["image-ft-pico", "image-mae-pico"])
def test_a_step_does_not_use_global_generators(preset: str, images: Path, tmp_path: Path):
    config: Config = small(preset, images, tmp_path, "run", batch=8)
    if "mae" in preset:
        config, make = replace(config, decode_ratio=0.5), mae.make_task
    else:
        config, make = everything_on(preset, images, tmp_path), finetune.make_task
    catalogue = open_dataset(images, "train")
    task = make(config, Run(ALONE))
    model = NormalizedInput(task.model, 1).train()
    batches = build.training_batches(config, ALONE, catalogue, 1, 0)
    next(batches)  # building the loader is not part of a step
    before = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    for _ in range(2):
        task.loss(model, next(batches)).backward()
    assert before == [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


# ---- mixing ----------------------------------------------------------------------------------------------


def mixing_of(mixup: float = 0.8, cutmix: float = 1.0, repeats: int = 1, batch: int = 16) -> FinetuneConfig:
    """Settings of mixing, for 5 classes."""
    base = finetune.FINETUNE_PRESETS["image-ft-pico"]
    data, optim = replace(base.data, repeats=repeats), replace(base.optim, batch=batch)
    return replace(base, data=data, optim=optim, mixup=mixup, cutmix=cutmix, smoothing=0.1)


def rows_of(count: int, frames: int, side: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pixels uint8 [count, (frames,) side, side + 8, 3] and labels below 5."""
    generator = torch.Generator().manual_seed(frames)
    shape = (count, frames, side, side + 8, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return pixels if frames > 1 else pixels.squeeze(1), torch.arange(count) % 5


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("kinds", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_equals_a_plain_loop(frames: int, repeats: int, kinds: tuple):
    """Compared row by row with a plain loop: timm's labels, and for cutmix the same box in all frames."""
    batch, step = 24, 7
    settings = mixing_of(mixup=kinds[0], cutmix=kinds[1], repeats=repeats, batch=batch)
    pixels, labels = rows_of(batch, frames)
    height, width = pixels.shape[-3:-1]
    mixed, soft = finetune.mix(settings, 5, pixels, labels, step * batch + np.arange(batch))
    drawn = finetune.draw_pairs(settings, step, height, width)
    pairs = []
    for row in range(batch):
        group, place = divmod(row, 2 * repeats)
        partner = group * 2 * repeats + (place + repeats) % (2 * repeats)
        pair = group * repeats + place % repeats
        pairs.append(pair)
        share, outside, top, bottom, left, right = drawn[pair].tolist()
        expected = (1 - outside) * pixels[row].float() + outside * pixels[partner].float()
        box = (..., slice(int(top), int(bottom)), slice(int(left), int(right)), slice(None))
        expected[box] = pixels[partner][box].float()
        torch.testing.assert_close(mixed[row], expected, rtol=0, atol=1e-3)
        if outside == 0:
            assert torch.equal(mixed[row], expected), "cutmix copies, it does not blend"
            assert share == pytest.approx((bottom - top) * (right - left) / height / width, abs=1e-6)
        two = timm_mixup.mixup_target(labels[[row, partner]], 5, 1 - share, smoothing=0.1)
        torch.testing.assert_close(soft[row], two[0], rtol=0, atol=1e-6)
    assert sorted(pairs) == sorted(2 * list(range(batch // 2)))
    assert (drawn[:, 1] == 0).any() == (kinds[1] > 0) and (drawn[:, 1] > 0).any() == (kinds[0] > 0)


def test_cutmix_boxes_equal_those_of_timm():
    """The same lambda and center give timm's box and corrected lambda, also at the border."""
    settings = mixing_of(mixup=0.0, batch=400)
    key = finetune.order.keys_of(0, finetune.order.STREAM_MIX, 3, np.arange(2))
    generator = np.random.Generator(np.random.Philox(key=key))
    generator.random(200)
    lambdas = generator.beta(np.ones(200), np.ones(200))
    centers = [generator.integers(0, size, 200) for size in (24, 32)]
    for pair, row in enumerate(finetune.draw_pairs(settings, 3, 24, 32)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timm_mixup.np.random, "randint", Mock(side_effect=[c[pair] for c in centers]))
            box, lam = timm_mixup.cutmix_bbox_and_lam((3, 24, 32), lambdas[pair])
        assert row[2:].tolist() == list(box)
        assert row[0] == pytest.approx(1 - lam, abs=1e-6)


def test_mixing_shares_are_beta_distributed_and_both_kinds_equally_likely():
    settings = mixing_of(batch=40_000)
    drawn = finetune.draw_pairs(settings, 0, 224, 224)
    cuts = drawn[:, 1] == 0
    assert abs(cuts.mean() - 0.5) < 5 * (0.25 / len(drawn)) ** 0.5
    sample = np.sort(np.random.default_rng(1).beta(0.8, 0.8, 100_000))
    found = np.sort(drawn[~cuts, 0])
    steps = np.arange(len(found)) / len(found)
    distance = np.abs(np.searchsorted(sample, found) / len(sample) - steps).max()
    assert distance < 2.2 * (1 / len(found) + 1 / len(sample)) ** 0.5  # Kolmogorov-Smirnov, p about 1e-4
    assert drawn[cuts, 2].min() == 0 and drawn[cuts, 3].max() == 224
    other = finetune.draw_pairs(settings, 1, 224, 224)
    assert abs(np.corrcoef(drawn[:, 0], other[:, 0])[0, 1]) < 5 / len(drawn) ** 0.5
    assert np.array_equal(drawn, finetune.draw_pairs(settings, 0, 224, 224))


@pytest.mark.parametrize("repeats", [1, 2])
def test_mixing_a_micro_batch_equals_mixing_the_whole_batch(repeats: int):
    settings = mixing_of(repeats=repeats)
    pixels, labels = rows_of(16, 1)
    positions = 5 * 16 + np.arange(16)
    whole = finetune.mix(settings, 5, pixels, labels, positions)
    for first in range(0, 16, 4):
        rows = slice(first, first + 4)
        part = finetune.mix(settings, 5, pixels[rows], labels[rows], positions[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


def test_no_row_is_mixed_with_a_copy_of_its_sample(clips: Path, tmp_path: Path):
    """Checked with real batches, in two processes with two micro batches each."""
    config = everything_on("video-ft-pico", clips, tmp_path)
    config = replace(config, optim=replace(config.optim, batch=16))
    catalogue = open_dataset(clips, "train")
    for rank in range(2):
        batches = build.training_batches(config, World(rank, 2, CPU), catalogue, 2, 3)
        for micro in range(4):
            batch = next(batches)
            step, part = divmod(micro, 2)
            first = (3 + step) * 16 + rank * 8 + part * 4
            assert batch.positions.tolist() == list(range(first, first + 4))
            ids = torch.from_numpy(batch.ids)
            assert (ids != finetune.partners(ids, 2)).all()


def test_micro_batches_contain_whole_pairs():
    def split(batch: int, micro: int, repeats: int, processes: int) -> tuple[int, int]:
        config = finetune.FINETUNE_PRESETS["video-ft-base"]
        config = replace(config, data=replace(config.data, repeats=repeats))
        config = replace(config, optim=replace(config.optim, batch=batch))
        config = replace(config, speed=replace(config.speed, micro_batch=micro))
        return build.micro_batches(config, processes, mixed=2)

    assert split(256, 16, 2, 1) == (16, 16)
    assert split(12, 3, 1, 1) == (2, 6)
    assert split(16, 1, 2, 2) == (4, 2)  # at least one pair
    with pytest.raises(
        UserError, match="12 is not divisible by 4 processes x 2 mixed samples; use a multiple of 8"
    ):
        split(12, 4, 1, 4)


def test_the_compilation_check_uses_the_signature_of_a_step(images: Path, tmp_path: Path):
    """The blank batch and the real batches use the same compilation."""
    config = everything_on("image-ft-pico", images, tmp_path)
    catalogue = open_dataset(images, "train")
    task = finetune.make_task(config, Run(ALONE))
    model, counter = NormalizedInput(task.model, 1).train(), CompileCounter()
    model.compile(fullgraph=True, backend=counter)
    task.loss(model, blank_batch(config.data, 8, CPU))
    batches = build.training_batches(config, ALONE, catalogue, 1, 0)
    for _ in range(2):
        task.loss(model, next(batches))
    assert counter.frame_count == 1
    torch._dynamo.reset()
