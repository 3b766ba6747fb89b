"""Our models equal three other implementations on the same random weights; uses benchmarks.parity."""

import pytest
import torch

import models
from benchmarks.parity import compare, random_mask, randomise, run_ours, upstream_model

torch.set_num_threads(2)
STAGES = (1, 2, 2, 1)  # base's widths with fewer blocks, for speed


@pytest.mark.parametrize(
    ("name", "peer", "overrides"),
    [
        ("hiera_base_224", "hiera-transformer", {"input_size": 160}),
        ("mae_hiera_base_224", "hiera-transformer", {"input_size": 160}),
        ("hiera_base_16x224", "hiera-transformer", {"input_size": (8, 96, 128)}),
        ("mae_hiera_base_16x224", "hiera-transformer", {"input_size": (8, 96, 128)}),
        ("hiera_base_plus_224", "timm", {"input_size": 96}),
        ("hiera_base_224", "timm", {"input_size": 128, "abs_win": True, "global_pos_size": (3, 3)}),
        ("hiera_small_abswin_256", "timm", {"input_size": 64, "width": 48, "global_pos_size": (3, 3)}),
        ("mae_hiera_pico_96", "hiera-transformer", {"input_size": 64, "mae_pools": 3}),
        ("hiera_base_plus_224", "transformers", {"input_size": 96}),
        ("mae_hiera_base_224", "transformers", {"input_size": 96}),
    ],
)
def test_outputs_gradients_and_initialization_equal_the_others(name, peer, overrides):
    row = compare(name, peer, STAGES, **overrides)
    assert row.outputs <= 1e-5
    assert row.gradient <= 1e-4
    assert row.gradients <= 1e-10
    assert row.passed, row


def test_the_comparison_detects_a_small_error():
    """An error of 0.1 % in one weight must fail the comparison."""
    torch.manual_seed(0)
    ours = models.create("hiera_pico_96").eval()
    randomise(ours)
    other = models.create("hiera_pico_96").eval()
    models.load_weights(other, ours.state_dict(), quiet=True)
    with torch.no_grad():
        other.blocks[2].attn.qkv.weight.mul_(1.001)
        x = torch.randn(1, 3, 96, 96)
        a, b = ours(x), other(x)
    assert (a - b).abs().max() > 1e-5 * a.abs().max()


@pytest.mark.parametrize(
    "name", ["hiera_base_224", "mae_hiera_base_224", "hiera_base_16x224", "mae_hiera_base_16x224"]
)
def test_outputs_at_full_input_size_equal_upstreams(name):
    torch.manual_seed(0)
    ours = models.create(name, stages=STAGES)
    randomise(ours)
    theirs = upstream_model(ours.config, mae=name.startswith("mae_")).train()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, *ours.input_size)
    mask = random_mask(ours) if name.startswith("mae_") else None
    with torch.no_grad():
        for expected, found in zip(run_ours(theirs, x, mask), run_ours(ours, x, mask), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
