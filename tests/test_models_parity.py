"""Our models against the authors' package on the same random weights: outputs and gradients."""

import warnings

import pytest
import torch

import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import hiera

torch.set_num_threads(2)
STAGES = (1, 2, 2, 1)  # base's widths with fewer blocks, for speed
SMALL = {"hiera_base_16x224": (8, 96, 128), "mae_hiera_base_16x224": (8, 96, 128)}


def upstream(name, **settings):
    """The authors' model of the same name; its own constructors do not allow another depth."""
    if "16x" in name:
        settings = {
            "input_size": (16, 224, 224),
            "num_classes": 400,
            "q_stride": (1, 2, 2),
            "mask_unit_size": (1, 8, 8),
            "patch_kernel": (3, 7, 7),
            "patch_stride": (2, 4, 4),
            "patch_padding": (1, 3, 3),
            "sep_pos_embed": True,
        } | settings
    if name.startswith("mae_"):
        return hiera.MaskedAutoencoderHiera(q_pool=2, **settings)
    return hiera.Hiera(**settings)


def randomise(model):
    """Give every parameter, norms and biases included, a random value of a trained model's size."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def pair(name, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    theirs = upstream(name, stages=STAGES, **settings).to(dtype).train()
    randomise(theirs)
    ours = models.create(name, stages=STAGES, **settings).to(dtype).train()
    models.load_weights(ours, theirs.state_dict(), quiet=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return theirs, ours, torch.randn(1, 3, *ours.input_size, dtype=dtype)


def assert_same_gradients(theirs, ours):
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", ["hiera_base_224", "hiera_base_16x224"])
def test_classifier_equals_upstream(name):
    theirs, ours, x = pair(name, **({"input_size": SMALL[name]} if name in SMALL else {}))
    expected, maps = theirs(x, return_intermediates=True)
    logits, our_maps = ours(x, return_intermediates=True)
    torch.testing.assert_close(logits, expected)
    for ours_at, theirs_at in zip(our_maps, maps, strict=True):
        torch.testing.assert_close(ours_at, theirs_at)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    assert_same_gradients(theirs, ours)
    assert torch.equal(ours.eval()(x), logits), "evaluation gives logits too"


@pytest.mark.parametrize(("name", "ratio"), [("mae_hiera_base_224", 0.6), ("mae_hiera_base_16x224", 0.9)])
def test_autoencoder_equals_upstream(name, ratio):
    theirs, ours, x = pair(name, **({"input_size": SMALL[name]} if name in SMALL else {}))
    x = torch.cat([x, torch.rand_like(x)]) if x.ndim == 4 else x
    mask = theirs.get_random_mask(x, ratio)
    keep = mask.nonzero()[:, 1].view(len(x), -1)
    expected = theirs(x, mask=mask)
    output = ours(x, keep=keep)
    for mine, other in zip(output, expected, strict=True):
        torch.testing.assert_close(mine, other)
    expected[0].backward()
    output.loss.backward()
    assert_same_gradients(theirs, ours)


@pytest.mark.parametrize("name", ["hiera_base_224", "mae_hiera_base_224", "mae_hiera_base_16x224"])
def test_initialisation_equals_upstream(name):
    torch.manual_seed(0)
    theirs = dict(upstream(name, stages=STAGES).named_parameters())
    for key, ours in models.create(name, stages=STAGES).named_parameters():
        count, spread = ours.numel(), theirs[key].std().item() if theirs[key].numel() > 1 else 0
        error = 6 * spread / count**0.5 + 1e-7  # six standard errors
        assert abs(ours.mean() - theirs[key].mean()) < 1.5 * error, key
        assert abs(ours.std().item() - spread) < 1.5 * error, key


@pytest.mark.parametrize("name", ["hiera_base_224", "hiera_base_16x224"])
def test_logits_in_single_precision_at_full_size(name):
    theirs, ours, x = pair(name, torch.float32)
    with torch.no_grad():
        expected, logits = theirs(x), ours(x)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "ratio"), [("mae_hiera_base_224", 0.6), ("mae_hiera_base_16x224", 0.9)])
def test_losses_in_single_precision_at_full_size(name, ratio):
    theirs, ours, x = pair(name, torch.float32)
    mask = theirs.get_random_mask(x, ratio)
    with torch.no_grad():
        for mine, other in zip(ours(x, mask)[:3], theirs(x, mask=mask)[:3], strict=True):
            assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
