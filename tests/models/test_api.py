"""Names, sizes, masks, weights files and errors of the models. test_models_parity.py checks the numbers."""

import pytest
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay

import models
from models import zoo
from models.mae import reconstruct
from models.unroll import reroll, unroll
from models.zoo import SIZES, Size
from pipelines.errors import UserError

torch.set_num_threads(2)


def keep_of(model, batch, kept, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, model.num_mask_units, generator=generator).argsort(1)
    return order[:, :kept].sort(1).values


def test_list_models_has_every_size_for_images_and_clips_as_classifier_and_autoencoder():
    names = models.list_models()
    classifiers = ["hiera_small_abswin_256", "hiera_base_abswin_224"]
    for size, row in SIZES.items():
        classifiers += [f"hiera_{size}_{row.side}", f"hiera_{size}_16x{row.clip_side}"]
    assert sorted(names) == sorted([*classifiers, *(f"mae_{name}" for name in classifiers)])
    assert {"hiera_pico_96", "hiera_pico_16x64", "mae_hiera_huge_16x224", "mae_hiera_base_plus_224"} <= set(
        names
    )


def test_a_line_of_sizes_defines_input_and_decoder(monkeypatch):
    nano = Size(24, 1, (1, 1, 2, 1), side=64, clip_side=32, decoder=(64, 1, 2))
    monkeypatch.setattr(zoo, "SIZES", {**SIZES, "nano": nano})
    configs = zoo._configs()
    image, clip = configs["hiera_nano_64"], configs["hiera_nano_16x32"]
    assert (image.input_size, clip.input_size) == ((64, 64), (16, 32, 32))
    for config in (image, clip):
        assert (config.width, config.heads, config.stages) == nano[:3]
        assert (config.decoder_width, config.decoder_depth, config.decoder_heads) == nano.decoder


def test_heads_of_weights_come_from_their_width_and_blocks_or_are_refused(monkeypatch):
    """Regression: of two sizes with the same width, the last one gave the heads."""
    state = models.create("hiera_pico_96").state_dict()
    pico = SIZES["pico"]
    monkeypatch.setattr(zoo, "SIZES", {"pico": pico, "nano": Size(48, 2, (1, 1, 2, 1))})
    assert zoo.config_of_weights(state).heads == 1
    monkeypatch.setattr(zoo, "SIZES", {"pico": pico, "nano": Size(48, 2, pico.stages)})
    with pytest.raises(UserError, match=r"sizes of \[1, 2\] heads have width 48, so the heads"):
        zoo.config_of_weights(state)
    monkeypatch.setattr(zoo, "SIZES", {"nano": Size(24, 1, (1, 1, 2, 1))})
    with pytest.raises(UserError, match="no known size has width 48"):
        zoo.config_of_weights(state)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("hiera_bse_224", {}, "did you mean 'hiera_base_224'"),
        ("hiera_pico_96", {"input_size": 100}, "; use 96x96 or 128x128"),
        ("hiera_pico_16x64", {"input_size": (15, 64, 64)}, "; use 14x64x64 or 16x64x64"),
        ("hiera_pico_16x64", {"input_size": (64, 64)}, "(T, H, W)"),
        ("hiera_pico_96", {"num_clases": 3}, "did you mean 'num_classes'"),
        ("mae_hiera_pico_96", {"num_classes": 3}, "no setting 'num_classes'"),
        ("mae_hiera_pico_96", {"decode_ratio": 1.5}, "decode_ratio"),
        ("mae_hiera_pico_96", {"mae_pools": 1}, "mae_pools is 1; choose 2 or 3"),
        ("hiera_pico_96", {"checkpoint_stages": (0,)}, "checkpoint_stages"),
        ("hiera_pico_16x64", {"abs_win": True}, "images only"),
    ],
)
def test_wrong_use_gets_one_line(name, overrides, message):
    with pytest.raises(UserError) as caught:
        models.create(name, **overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_input_shapes_and_masks_are_refused():
    model = models.create("mae_hiera_pico_96")
    with pytest.raises(UserError, match=r"\[B, 3, 96, 96\]"):
        model(torch.rand(1, 3, 64, 64))
    with pytest.raises(UserError, match="keeps 0 of 9"):
        model(torch.rand(1, 3, 96, 96), mask_ratio=0.95)
    uneven = torch.zeros(2, 9, dtype=torch.bool)
    uneven[0, :3] = uneven[1, :4] = True
    with pytest.raises(UserError, match="the same number"):
        model(torch.rand(2, 3, 96, 96), mask=uneven)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("hiera_pico_96", {"input_size": 64, "in_chans": 1, "num_classes": 7, "head_dropout": 0.5}),
        ("hiera_pico_96", {"input_size": (96, 160), "drop_path_rate": 0.2}),
        ("hiera_pico_16x64", {"input_size": (8, 64, 96), "num_classes": 5}),
    ],
)
def test_classifiers_accept_other_sizes_channels_and_classes(name, overrides):
    model = models.create(name, **overrides)
    logits, maps = model(
        torch.rand(2, overrides.get("in_chans", 3), *model.input_size), return_intermediates=True
    )
    assert logits.shape == (2, overrides.get("num_classes", 1000))
    strides = [4, 8, 16, 32]
    for level, stride in zip(maps, strides, strict=True):
        spatial = tuple(size // stride for size in model.input_size[-2:])
        frames = (model.input_size[0] // 2,) if model.config.video else ()
        assert level.shape[1:-1] == frames + spatial


def test_token_order_matches_the_drawing():
    """The first rows of the drawing in the docstring of models/unroll.py."""
    order = unroll(torch.arange(64).view(1, 1, 8, 8, 1)).flatten().argsort().view(8, 8)
    assert order[:2].tolist() == [[0, 16, 4, 20, 1, 17, 5, 21], [32, 48, 36, 52, 33, 49, 37, 53]]


@pytest.mark.parametrize("pools", [1, 2, 3])
def test_reroll_inverts_unroll_and_max_pool_equals_spatial_pooling(pools):
    x = torch.rand(2, 3, 16, 24, 5)
    tokens = unroll(x, pools)
    units = (3, 16 >> pools, 24 >> pools)
    assert torch.equal(reroll(tokens, units), x)
    pooled = models.unroll.max_pool(tokens)
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.max_pool2d(frames, 2).permute(0, 2, 3, 1).unflatten(0, (2, 3))
    assert torch.equal(reroll(pooled, units), expected)


@pytest.mark.parametrize("name", ["mae_hiera_pico_96", "mae_hiera_pico_16x64"])
def test_masked_pixels_get_zero_gradient(name):
    model = models.create(name)
    x = torch.rand(2, 3, *model.input_size, requires_grad=True)
    keep = keep_of(model, 2, 3)
    model.fuse(model.encode(x, keep)).square().sum().backward()
    mask = model(x, keep=keep).mask.view(2, 1, *model.mask_units)
    for axis, size in enumerate(model.input_size, start=2):
        mask = mask.repeat_interleave(size // mask.shape[axis], dim=axis)
    assert x.grad is not None
    assert (x.grad[~mask.expand_as(x)] == 0).all()
    assert (x.grad[mask.expand_as(x)] != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", ["mae_hiera_pico_96", "mae_hiera_pico_16x64"])
def test_mask_and_keep_give_the_same_loss(name):
    model = models.create(name).eval()
    x = torch.rand(2, 3, *model.input_size)
    drawn = model(x, mask_ratio=0.6)
    assert (drawn.mask.sum(1) == int(model.num_mask_units * 0.4)).all()
    again = model(x, mask=drawn.mask)
    assert torch.equal(again.loss, drawn.loss)
    assert torch.equal(again.loss, ((again.pred - again.label) ** 2).mean())


@pytest.mark.parametrize("name", [n for n in models.list_models() if "pico" in n])
def test_init_weights_initializes_every_parameter(name):
    settings = {"abs_win": True, "layer_scale": 0.1, "expand_proj": False}
    model = models.create(name, **({} if "mae" in name or "16x" in name else settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert not [n for n, p in model.named_parameters() if not p.isfinite().all()]
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("name", "pools"), [("mae_hiera_pico_96", 2), ("mae_hiera_pico_96", 3), ("mae_hiera_pico_16x64", 2)]
)
def test_reconstruct_changes_only_masked_patches(name, pools, normalize):
    model = models.create(name, mae_pools=pools, normalize_targets=normalize).eval()
    x = torch.rand(2, 3, *model.input_size)
    keep = keep_of(model, 2, 4)
    picture = reconstruct(model, x, keep)
    frames = x[:, :, ::2] if model.config.video else x
    assert picture.shape == frames.shape
    output = model(x, keep=keep)
    mask = output.mask.view(2, 1, *model.mask_units)
    mask = mask.repeat_interleave(32, -1).repeat_interleave(32, -2).expand_as(frames)
    assert torch.equal(picture[mask], frames[mask])
    # A model that predicts the labels exactly must reconstruct the input.
    model.decode = lambda latent, kept, masked: model.labels(x, masked)[0]
    torch.testing.assert_close(reconstruct(model, x, keep), frames)


def test_targets_are_pixels_unless_they_are_normalized():
    x, ids = torch.rand(2, 3, 96, 96), torch.tensor([[0, 7], [35, 3]])
    plain = models.create("mae_hiera_pico_96", normalize_targets=False).labels(x, ids)[0]
    patch = x[0, :, 16:32, 16:32]  # of the 6 x 6 patches, number 7
    assert torch.equal(plain[0, 1], patch.flatten())
    normalized = models.create("mae_hiera_pico_96").labels(x, ids)[0]
    variance, mean = torch.var_mean(patch)
    torch.testing.assert_close(normalized[0, 1], ((patch - mean) / (variance + 1e-6).sqrt()).flatten())


def test_decode_ratio_applies_only_in_training():
    model = models.create("mae_hiera_pico_96", decode_ratio=0.5)
    x, keep = torch.rand(2, 3, 96, 96), torch.tensor([[0, 4], [1, 8]])
    assert model.train()(x, keep=keep).pred.shape == (2 * 14, 768)
    full = model.eval()(x, keep=keep)
    assert full.pred.shape == (2 * 28, 768)
    torch.manual_seed(3)
    part = model.train()(x, keep=keep)
    rows = {tuple(row) for row in full.label.tolist()}
    assert all(tuple(row) in rows for row in part.label.tolist())


@pytest.mark.parametrize("name", ["hiera_pico_16x64", "mae_hiera_pico_96"])
def test_activation_checkpointing_does_not_change_gradients(name):
    plain = models.create(name, drop_path_rate=0.3)
    saving = models.create(name, drop_path_rate=0.3, checkpoint_stages=(1, 2, 3, 4))
    models.load_weights(saving, plain.state_dict(), quiet=True)
    x = torch.rand(2, 3, *plain.input_size)
    grads = []
    for model in (plain, saving):
        torch.manual_seed(1)
        output = model(x) if name.startswith("hiera") else model(x).loss
        output.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_layer_decay_scales_and_weight_decay_by_parameter():
    model = models.create("hiera_pico_96")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["head.projection.weight"])] == scale[id(named["norm.weight"])] == 1
    assert scale[id(named["blocks.7.attn.qkv.weight"])] == 0.5
    assert scale[id(named["pos_embed"])] == scale[id(named["patch_embed.proj.weight"])] == 0.5**9
    assert decay[id(named["pos_embed"])] == 0 < decay[id(named["blocks.0.mlp.fc1.weight"])]


def test_a_classifier_loads_an_autoencoders_encoder(tmp_path, capsys):
    mae = models.create("mae_hiera_pico_96")
    torch.save({"model_state": mae.state_dict()}, tmp_path / "mae.pth")
    model = models.create("hiera_pico_96")
    before = model.norm.bias.clone()
    report = models.load_weights(model, tmp_path / "mae.pth")
    assert torch.equal(model.blocks[3].attn.qkv.weight, mae.blocks[3].attn.qkv.weight)
    assert torch.equal(model.norm.bias, before)
    fresh = {"norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias"}
    assert set(report.fresh) == fresh
    assert "decoder_blocks.*" in capsys.readouterr().out
    report = models.load_weights(model, tmp_path / "mae.pth", reuse_encoder_norm=True)
    assert "norm.weight" in report.loaded
    assert torch.equal(model.norm.bias, mae.encoder_norm.bias)


def test_a_head_with_another_number_of_classes_is_not_loaded(tmp_path):
    save_file(models.create("hiera_pico_96").state_dict(), tmp_path / "model.safetensors")
    report = models.load_weights(
        models.create("hiera_pico_96", num_classes=7), tmp_path / "model.safetensors"
    )
    assert set(report.fresh) == {"head.projection.weight", "head.projection.bias"}


def test_missing_damaged_and_unsuitable_weights_are_refused(tmp_path):
    model = models.create("hiera_pico_96")
    with pytest.raises(UserError, match="no weights file at"):
        models.load_weights(model, tmp_path / "absent.pth")
    with pytest.raises(UserError, match=r"are called mae_hiera_base_224:mae_in1k$"):
        models.load_weights(model, "mae_hiera_base_224")
    (tmp_path / "broken.pth").write_bytes(b"not a zip")
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    for name in ("broken.pth", "broken.safetensors"):
        with pytest.raises(UserError, match="is not a weights file, or it is damaged"):
            models.load_weights(model, tmp_path / name)
    torch.save({"model_state": [print]}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"contains more than tensors \(\S*print\)"):
        models.load_weights(model, tmp_path / "code.pth")
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load_weights(model, models.create("hiera_pico_96", width=96).state_dict())
    with pytest.raises(UserError, match="it lacks mask_token, decoder_pos"):
        models.load_weights(models.create("mae_hiera_pico_96"), model.state_dict())
