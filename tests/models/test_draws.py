"""Draws from keys: their quality, and the drop path, dropout and decoded tokens drawn from them."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import models
from models import layers
from pipelines.order import row_keys

torch.set_num_threads(1)
NAMES = ["hiera_pico_96", "mae_hiera_pico_96", "hiera_pico_16x64"]


def keys_like(kind: str, count: int) -> torch.Tensor:
    """Keys as the trainer makes them, or keys that differ only in a few bits."""
    numbers = torch.arange(count)
    if kind == "hashed":
        return torch.from_numpy(row_keys(0, np.zeros(count, np.int64), np.arange(count)))
    return numbers << {"low": 0, "high": 32, "top": 48}[kind]


# ---- the hash --------------------------------------------------------------------------------------------


def test_draws_equal_those_of_plain_python_integers():
    """Compared with Python integers, for positive and negative keys and for the order of the draws."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0xD35A2D97 % 2**32
        return x ^ (x >> 15)

    keys = [0, 1, -1, 2**62 + 12345, -(2**63), 0x123456789ABCDEF]
    found = layers.uniform(torch.tensor(keys), 3, 5)
    for row, key in zip(found.tolist(), keys, strict=True):
        low, high = key % 2**32, (key % 2**64) >> 32
        for counter, value in enumerate(row, start=1):
            x = mix((mix((counter * layers.GOLDEN + low) % 2**32) + high + 3 * layers.GOLDEN) % 2**32)
            assert value == (x >> 8) / 2**24
    assert torch.equal(found[:, :2], layers.uniform(torch.tensor(keys), 3, 2))


@pytest.mark.parametrize("kind", ["hashed", "low", "high", "top"])
def test_draws_are_uniform_and_independent(kind: str):
    """Mean, variance, chi-square over 256 bins and correlation of neighbors are within 5 sigma."""
    keys = keys_like(kind, 4096)
    table = torch.stack([layers.uniform(keys, stream, 64) for stream in (1, 2)]).double()
    count = table[0].numel()
    assert table.min() >= 0 and table.max() < 1
    for u in table:
        assert abs(u.mean() - 1 / 2) < 5 / (12 * count) ** 0.5
        assert abs(u.var() - 1 / 12) < 5 / (180 * count) ** 0.5
        bins = torch.bincount((u * 256).long().flatten(), minlength=256)
        chi = ((bins - count / 256) ** 2 / (count / 256)).sum()
        assert abs(chi - 255) < 5 * (2 * 255) ** 0.5
        rows = torch.bincount((u[:, 0] * 256).long(), minlength=256)  # over keys at one counter
        assert ((rows - 16) ** 2 / 16).sum() < 255 + 5 * (2 * 255) ** 0.5
    a, b = (table - 0.5) * 12**0.5
    neighbors = {
        "keys": (a[1:], a[:-1]),
        "counters": (a[:, 1:], a[:, :-1]),
        "streams": (a, b),
        "streams and counters": (a[:, 1:], b[:, :-1]),
    }
    for what, (x, y) in neighbors.items():
        assert abs((x * y).mean()) < 5 / x.numel() ** 0.5, what


# ---- drop path, dropout, decoded tokens ------------------------------------------------------------------


def test_drop_path_has_linear_rates_and_independent_branches():
    x = torch.empty(20_000, 1)
    scales = layers.drop_path_scales(x, 0.4, 5, keys_like("hashed", len(x)))
    assert scales[0] is None  # the first block's rate is 0
    for scale, rate in zip(scales[1:], (0.1, 0.2, 0.3, 0.4), strict=True):
        assert scale is not None and scale.shape == (20_000, 2)
        torch.testing.assert_close(scale.unique(), torch.tensor([0, 1 / (1 - rate)]))
        spread = 5 * (rate * (1 - rate) / 20_000) ** 0.5
        assert (scale == 0).float().mean(0).sub(rate).abs().max() < spread
        both = (scale == 0).all(dim=1).float().mean().item()
        assert abs(both - rate**2) < spread  # the two branches are independent


def test_dropout_and_the_decoded_share_have_their_rates():
    x = torch.ones(500, 200)
    kept = layers.dropout(x, 0.25, keys_like("hashed", 500))
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 4 / 3]))
    assert abs((kept == 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    ids = torch.arange(10).expand(20_000, 10)
    share = layers.random_share(ids, 0.3, keys_like("hashed", len(ids)))
    assert share.shape == (20_000, 3) and (share.diff(dim=1) > 0).all()
    counts = torch.bincount(share.flatten(), minlength=10) / 20_000
    assert counts.sub(0.3).abs().max() < 5 * (0.3 * 0.7 / 20_000) ** 0.5


def build(name: str, **settings: object):
    torch.manual_seed(0)
    own = {"decode_ratio": 0.5} if name.startswith("mae_") else {"head_dropout": 0.5, "num_classes": 5}
    stages = {"stages": (1, 1, 2, 1), "drop_path_rate": 0.5}
    return models.create(name, **{**own, **stages, **settings}).train()


def inputs(model, rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {"x": torch.rand(rows, 3, *model.input_size, generator=generator)}
    given["row_keys"] = torch.from_numpy(row_keys(0, np.zeros(rows, np.int64), np.arange(rows)))
    if hasattr(model, "decoder_pred"):
        noise = torch.rand(rows, model.num_mask_units, generator=generator)
        given["keep"] = noise.argsort(1)[:, :3].sort(1).values
    return given


def output(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Predictions or logits per row, [rows, ...]."""
    found = model(**given)
    return found if isinstance(found, torch.Tensor) else found.pred.unflatten(0, (len(given["x"]), -1))


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_output_depends_only_on_its_own_key(name: str):
    """In training, the rest of the batch and torch's generator have no effect; another key has one."""
    model, state = build(name), torch.get_rng_state()
    given = inputs(model)
    with torch.no_grad():
        whole = output(model, given)
        parts = [output(model, {k: v[rows] for k, v in given.items()}) for rows in ([0, 1], [2, 3, 4, 5])]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
        other = output(model, given | {"row_keys": given["row_keys"] + 1})
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(whole, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    given.pop("row_keys")
    assert not torch.equal(output(model, given), output(model, given)), (
        "without keys, torch's generator is used"
    )
    model.eval()
    assert torch.equal(output(model, given), output(model, given))


@pytest.mark.parametrize("name", NAMES)
def test_keys_have_no_effect_if_all_rates_are_zero(name: str):
    off = {"decode_ratio": 1.0} if name.startswith("mae_") else {"head_dropout": 0.0}
    model = build(name, drop_path_rate=0.0, **off)
    given = inputs(model)
    with torch.no_grad():
        found = output(model, given)
        given.pop("row_keys")
        assert torch.equal(found, output(model.eval(), given))


def test_a_dropped_branch_adds_nothing():
    """Compared with one block computed by hand, with the factors of two rows."""
    model = build("hiera_pico_96")
    block, x = model.blocks[0], torch.rand(2, 3, 64, 48)
    scales = torch.tensor([[0.0, 2.0], [1.25, 0.0]])
    after = x + torch.tensor([0.0, 1.25]).view(2, 1, 1, 1) * block.attn(block.norm1(x))
    after = after + torch.tensor([2.0, 0.0]).view(2, 1, 1, 1) * block.mlp(block.norm2(after))
    torch.testing.assert_close(block(x, scales), after)


@pytest.mark.parametrize("name", ["hiera_pico_96", "mae_hiera_pico_96"])
def test_recomputed_activations_use_the_same_draws(name: str):
    grads = []
    for stages in ((), (1, 2, 3, 4)):
        model = build(name, checkpoint_stages=stages)
        output(model, inputs(model)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_compiled_step_is_one_graph_with_the_same_draws():
    model = build("mae_hiera_pico_96", stages=(1, 1, 1, 1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    given = inputs(model)
    for keys in (given["row_keys"], given["row_keys"] * 3 + 1):
        found = []
        for run in (model, compiled):
            model.zero_grad(set_to_none=True)
            result = output(run, given | {"row_keys": keys})
            result.square().sum().backward()
            found.append([result.detach(), *(p.grad for p in model.parameters())])
        for eager, other in zip(*found, strict=True):
            assert (eager - other).abs().max() <= 1e-5 * eager.abs().max().clamp(min=1e-3)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_generated_code_draws_the_same_numbers():
    keys = keys_like("hashed", 64) * 2 - 1
    compiled = torch.compile(layers.uniform, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(keys, 1, 48), layers.uniform(keys, 1, 48))
    torch._dynamo.reset()
