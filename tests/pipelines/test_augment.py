"""Batched augmentation equals Pillow's operations as timm uses them, one picture at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops

from pipelines import augment as ours
from pipelines.augment import augment
from pipelines.config import Augment
from pipelines.views import blank_rows
from tests.pipelines_fixtures import picture

STRENGTHS = {
    "autocontrast": [0],
    "equalize": [0],
    "invert": [0],
    "rotate": [-30, -7, 20],
    "posterize": [0, 1, 3, 4],
    "solarize": [0, 10, 128, 256],
    "solarize_add": [0, 30, 110],
    "saturation": [0.1, 0.6, 1.9],
    "contrast": [0.1, 0.6, 1.9],
    "brightness": [0.1, 0.6, 1.9],
    "sharpness": [0.1, 0.6, 1.9],
    "shear_x": [-0.3, 0.11],
    "shear_y": [-0.3, 0.11],
    "translate_x": [-0.45, 0.2],
    "translate_y": [-0.45, 0.2],
}
MOVES = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
TIMM_NAMES = {"saturation": "color", "translate_x": "translate_x_rel", "translate_y": "translate_y_rel"}
TIMM_NAMES |= {"autocontrast": "auto_contrast"}


def clip(frames=2, height=48, width=64):
    """A clip with room to increase the contrast; all its frames differ."""
    pixels = np.stack([picture(width, height, seed) for seed in range(frames)])
    return (pixels * 0.7 + 20).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "strength"), [(name, value) for name, values in STRENGTHS.items() for value in values]
)
def test_operations_equal_those_of_pillow(name, strength):
    pixels = clip()
    values = torch.tensor([1.0, strength]).view(-1, 1, 1, 1, 1)  # the second row is tested
    rows = torch.from_numpy(np.stack([pixels[::-1].copy(), pixels]))
    mine = ours.OPERATIONS[name][0](rows, values)[1].numpy().astype(int)
    function = getattr(timm_ops, TIMM_NAMES.get(name, name))
    fixed = {"fillcolor": (128,) * 3, "resample": Image.Resampling.BILINEAR} if name in MOVES else {}
    arguments = [] if name in ("autocontrast", "equalize", "invert") else [strength]
    theirs = [np.asarray(function(Image.fromarray(frame), *arguments, **fixed)) for frame in pixels]
    gap = np.abs(mine - np.stack(theirs))
    if name in MOVES:  # the implementations differ in pixels that are partly outside
        assert gap.mean() < 1.5 and np.median(gap) <= 1
    else:
        assert gap.max() <= 1


def test_strengths_equal_those_of_timm():
    levels = np.linspace(0, 1, 21)
    minus = -np.ones(21)
    for name, timm_function in [
        ("posterize", timm_ops._posterize_increasing_level_to_arg),
        ("solarize", timm_ops._solarize_increasing_level_to_arg),
        ("solarize_add", timm_ops._solarize_add_level_to_arg),
    ]:
        assert ours.OPERATIONS[name][1](levels, minus).tolist() == [
            timm_function(10 * level, {})[0] for level in levels
        ]
    timm_ranges = [
        ("rotate", timm_ops._rotate_level_to_arg),
        ("shear_x", timm_ops._shear_level_to_arg),
        ("translate_y", timm_ops._translate_rel_level_to_arg),
        ("contrast", timm_ops._enhance_increasing_level_to_arg),
    ]
    for name, timm_function in timm_ranges:
        both = {round(timm_function(7, {})[0], 6) for _ in range(50)}  # timm draws the sign in the function
        signed = ours.OPERATIONS[name][1](np.full(2, 0.7), np.array([-1.0, 1.0]))
        assert set(np.round(signed, 6)) == both
    names = [TIMM_NAMES.get(name, name) for name in ours.OPERATIONS]
    assert len(names) == len(timm_ops._RAND_INCREASING_TRANSFORMS)


def run(spec, batch=64, frames=3, seed=0):
    pixels = torch.from_numpy(np.stack([np.stack([clip(1)[0]] * frames)] * batch))
    return augmented(pixels, spec, seed, np.arange(batch))


def augmented(pixels, spec, seed, ids):
    """The augmented pixels of samples `ids` in epoch 0."""
    augment(pixels, blank_rows(len(ids))._replace(ids=ids), spec, seed)
    return pixels


def test_all_frames_of_a_clip_get_the_same_operations_and_rows_differ():
    out = run(Augment(layers=2, jitter=0.4))
    assert (out == out[:, :1]).all()
    assert len({row.numpy().tobytes() for row in out}) > 50


def test_a_row_depends_only_on_seed_epoch_and_sample():
    spec = Augment(layers=2, jitter=0.3, erase=1.0)
    whole = run(spec)
    start = torch.from_numpy(np.stack([np.stack([clip(1)[0]] * 3)] * 5))
    part = augmented(start, spec, 0, np.arange(20, 25))
    assert torch.equal(part, whole[20:25])
    assert (run(spec, seed=1) != whole).any()


def test_probability_and_magnitude_are_applied():
    plain = run(Augment())
    changed = [
        (run(Augment(layers=1, probability=p), batch=400) != plain[0]).flatten(1).any(1).float().mean()
        for p in (0.0, 0.5, 1.0)
    ]
    assert changed[0] == 0 and 0.4 < changed[1] < 0.6 and changed[2] > 0.97
    spec = Augment(layers=1, probability=1.0, magnitude_std=0.0)
    mild, strong = (run(replace(spec, magnitude=m)).int() for m in (1.0, 9.0))
    assert (strong - plain.int()).abs().float().mean() > (mild - plain.int()).abs().float().mean()


def test_erasing_fills_the_same_box_in_all_frames():
    plain, out = run(Augment(), batch=200), run(Augment(erase=0.25), batch=200)
    hit = (out != plain).any(-1)  # [b, T, H, W]
    rows = hit.flatten(1).any(1)
    assert 0.15 < rows.float().mean() < 0.35
    for box in hit[rows].any(1):
        ys, xs = np.nonzero(box.numpy())
        area = (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
        assert 0.01 < area / box.numel() < 0.36 and box.sum() > 0.98 * area


def test_images_are_augmented_too():
    pixels = torch.from_numpy(np.stack([clip(1)[0]] * 8))
    out = augmented(pixels, Augment(layers=2, erase=1.0), 0, np.arange(8))
    assert out.shape == (8, 48, 64, 3) and out.dtype == torch.uint8
