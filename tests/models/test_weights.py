"""Conversion between formats, sizes and kinds of model; download of official weights."""

import errno
import fcntl
import hashlib
import http.server
import os
import re
import threading

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from benchmarks.parity import randomise, run_ours, timm_model, transformers_model, upstream_model
from models import files
from models.formats import format_of, from_ours, to_ours
from models.weights import inflate, resample
from pipelines.errors import UserError
from tools.convert import convert

torch.set_num_threads(2)


def random_model(name, **overrides):
    torch.manual_seed(0)
    model = models.create(name, **overrides).eval()
    randomise(model)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["hiera_pico_96", "mae_hiera_pico_96"])
@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_round_trips_are_bit_equal(name, to, tmp_path):
    """upstream -> ours -> other -> ours -> upstream; each step writes a file with tools.convert."""
    theirs = upstream_model(models.create(name).config, mae=name.startswith("mae_"))
    torch.save({"model_state": theirs.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    convert(str(tmp_path / "a.pth"), tmp_path / "b.safetensors", to="ours")
    convert(str(tmp_path / "b.safetensors"), tmp_path / "c.safetensors", to=to)
    convert(str(tmp_path / "c.safetensors"), tmp_path / "d.pth", to="upstream")
    start, middle = theirs.state_dict(), load_file(tmp_path / "c.safetensors")
    assert format_of(middle) == to
    end = torch.load(tmp_path / "d.pth", weights_only=True)["model_state"]
    if name == "mae_hiera_pico_96" and to == "timm":  # timm has the encoder, with encoder_norm as its norm
        assert torch.equal(end.pop("norm.weight"), start["encoder_norm.weight"])
        assert torch.equal(end.pop("norm.bias"), start["encoder_norm.bias"])
        start = {n: v for n, v in start.items() if n.startswith(("patch_embed", "pos_embed", "blocks"))}
    assert same(start, end)


def test_clip_models_convert_to_timm_and_back():
    state = models.create("hiera_pico_16x64").state_dict()
    assert same(to_ours(from_ours(state, "timm")), state)
    with pytest.raises(UserError, match="images"):
        from_ours(state, "transformers")


@pytest.mark.parametrize(
    ("weights", "target", "to", "message"),
    [
        ({"a": torch.zeros(1)}, "out.pth", "ours", "contains no Hiera weights"),
        ("hiera_pico_96", "out.bin", "timm", "must end in .safetensors or .pth"),
        ("hiera_pico_16x64", "out", "transformers", "images with plain position embeddings only"),
        ("hiera_pico_96", "out.pth", "sam2", r"train with --model.abs-win True"),
        ("scaled", "out.pth", "sam2", "no layer scale or pooled widening; choose --to timm"),
        ("scaled", "out.pth", "upstream", "no layer scale or pooled widening; choose --to timm"),
        ("mae_hiera_pico_96", "out.onnx", "onnx", "has no classifier, which --to onnx needs; finetune"),
        ("hiera_pico_96", "out.pth", "pt2", r"must end in .pt2"),
    ],
)
def test_impossible_conversions_are_refused(tmp_path, weights, target, to, message):
    scaled = {"abs_win": True, "layer_scale": 1e-5} if weights == "scaled" else {}
    if isinstance(weights, str):
        weights = models.create("hiera_pico_96" if scaled else weights, **scaled).state_dict()
    state = weights
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "in.pth"), tmp_path / target, to=to)
    assert not (tmp_path / target).exists()


def test_a_file_is_not_converted_onto_itself(tmp_path):
    save_file(random_model("hiera_pico_96").state_dict(), tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(UserError, match="is the source itself"):
        convert(str(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", to="timm")
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_transformers_opens_a_converted_folder(tmp_path):
    model = random_model("hiera_base_plus_224", stages=(1, 1, 1, 1), input_size=64, num_classes=5)
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    (tmp_path / "data.json").write_text('{"classes": ["ant", "bee", "cat", "dog", "elk"]}')
    convert(str(tmp_path / "ours.safetensors"), tmp_path / "hf", to="transformers")
    theirs = transformers.HieraForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.id2label[2] == "cat" and theirs.config.label2id == {
        name: number for number, name in enumerate(["ant", "bee", "cat", "dog", "elk"])
    }
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-4, atol=1e-5)
    again = models.create("hiera_base_plus_224", stages=(1, 1, 1, 1), input_size=64, num_classes=5)
    models.load_weights(again, tmp_path / "hf")
    assert same(again.state_dict(), model.state_dict())


def test_transformers_opens_a_converted_autoencoder(tmp_path):
    model = random_model("mae_hiera_pico_96")
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    convert(str(tmp_path / "ours.safetensors"), tmp_path / "hf", to="transformers")
    theirs = transformers.HieraForPreTraining.from_pretrained(tmp_path / "hf").eval()
    x, mask = torch.rand(1, 3, 96, 96), (torch.arange(9) % 3 == 0)[None]
    with torch.no_grad():
        loss = model(x, mask).loss
        theirs.config.mask_ratio = theirs.hiera.embeddings.patch_embeddings.mask_ratio = 2 / 3
        torch.testing.assert_close(theirs(x, noise=(~mask).float()).loss, loss)


def test_loading_timm_and_transformers_models_directly():
    model = random_model("hiera_pico_96")
    for build in (timm_model, transformers_model):
        theirs = build(model.config, mae=False)
        ours = models.create("hiera_pico_96").eval()
        report = models.load_weights(ours, theirs.state_dict(), quiet=True)
        assert not report.fresh
        assert not report.unused
        x = torch.rand(1, 3, 96, 96)
        theirs_logits = theirs.eval()(x)
        theirs_logits = getattr(theirs_logits, "logits", theirs_logits)
        torch.testing.assert_close(ours(x), theirs_logits)


def birder_names(state, stages):
    """Weights under the names of birder's files, for an autoencoder with its classifier's untrained norm."""
    places = [f"body.stage{stage}.{n}" for stage, depth in enumerate(stages, 1) for n in range(depth)]
    found = {}
    for name, value in state.items():
        layer = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        if name.startswith("blocks."):
            _, number, rest = layer.split(".", 2)
            layer = f"encoder.{places[int(number)]}.{rest}"
        elif name.startswith(("patch_embed", "pos_embed")):
            layer = "encoder." + layer.replace("patch_embed", "stem")
        found[layer] = value
    width = 8 * len(state["patch_embed.proj.bias"])
    return found | {
        "encoder.features.1.weight": torch.ones(width),
        "encoder.features.1.bias": torch.ones(width),
    }


def test_birders_autoencoder_loads(tmp_path):
    settings = {"input_size": 64, "abs_win": True, "global_pos_size": (4, 4), "mae_pools": 3}
    model = random_model("mae_hiera_pico_96", **settings)
    theirs = birder_names(model.state_dict(), (1, 2, 4, 1))
    assert {
        "encoder.stem.proj.weight",
        "encoder.body.stage3.3.mlp.3.bias",
        "decoder_blocks.1.mlp.0.bias",
    } <= {*theirs}
    facts = {"birder_version": "0.8.4", "signature": {"inputs": [{"data_shape": [0, 3, 64, 64]}]}}
    torch.save({"state": theirs, **facts}, tmp_path / "mae.pt")
    again = models.create("mae_hiera_pico_96", **settings)
    report = models.load_weights(again, tmp_path / "mae.pt", quiet=True)
    assert not report.fresh and not report.unused and same(again.state_dict(), model.state_dict())
    classifier = models.create("hiera_pico_96", input_size=64, abs_win=True, global_pos_size=(4, 4))
    before = classifier.norm.bias.clone()
    assert models.load_weights(classifier, tmp_path / "mae.pt", quiet=True).fresh[0] == "norm.weight"
    assert torch.equal(classifier.norm.bias, before), (
        "birder's pretraining does not train its classifier's norm"
    )


def test_birders_encoder_and_classifier_load():
    settings = {"input_size": 64, "abs_win": True, "global_pos_size": (4, 4), "num_classes": 3}
    model = random_model("hiera_pico_96", **settings)
    trained = dict(model.state_dict())
    norm = {f"features.1.{part}": trained.pop(f"norm.{part}") for part in ("weight", "bias")}
    head = {f"classifier.{part}": trained.pop(f"head.projection.{part}") for part in ("weight", "bias")}
    theirs = {
        name.removeprefix("encoder."): value for name, value in birder_names(trained, (1, 2, 4, 1)).items()
    }
    again = models.create("hiera_pico_96", **settings)
    report = models.load_weights(again, {**theirs, **norm}, quiet=True)
    assert set(report.fresh) == {"head.projection.weight", "head.projection.bias"}
    models.load_weights(again, {**theirs, **norm, **head}, quiet=True)
    assert same(again.state_dict(), model.state_dict())


def hieradet_shapes(width, stages):
    """Names and shapes of the parameters of SAM 2's image encoder, without its prefix."""
    shapes = {"pos_embed": (1, width, 14, 14), "pos_embed_window": (1, width, 8, 8)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 7, 7), "patch_embed.proj.bias": (width,)}
    number, before = 0, width
    for stage, depth in enumerate(stages):
        dim = width << stage
        for _ in range(depth):
            linear = {"attn.qkv": (3 * dim, before), "attn.proj": (dim, dim)}
            linear |= {"mlp.layers.0": (4 * dim, dim), "mlp.layers.1": (dim, 4 * dim)}
            linear |= {"proj": (dim, before)} if dim != before else {}
            for layer, shape in linear.items():
                shapes |= {
                    f"blocks.{number}.{layer}.weight": shape,
                    f"blocks.{number}.{layer}.bias": shape[:1],
                }
            for layer, size in (("norm1", before), ("norm2", dim)):
                shapes |= {f"blocks.{number}.{layer}.{part}": (size,) for part in ("weight", "bias")}
            number, before = number + 1, dim
    return shapes


@pytest.mark.parametrize(
    ("name", "width", "stages", "tensors"),
    [
        ("mae_hiera_tiny_224", 96, (1, 2, 7, 2), 154),
        ("hiera_base_plus_224", 112, (2, 3, 16, 3), 298),
    ],
)
def test_sam2_gets_the_names_and_shapes_of_its_image_encoder(name, width, stages, tensors):
    with torch.device("meta"):
        state = models.create(name, abs_win=True).state_dict()
    found = {name: tuple(value.shape) for name, value in from_ours(state, "sam2").items()}
    assert found == hieradet_shapes(width, stages) and len(found) == tensors


def test_weights_convert_to_sam2_and_back(tmp_path, capsys):
    model = random_model("mae_hiera_pico_96", abs_win=True)
    save_file(model.state_dict(), tmp_path / "run.safetensors")
    convert(str(tmp_path / "run.safetensors"), tmp_path / "trunk.pth", to="sam2")
    assert "stages [1, 2, 4, 1], window_pos_embed_bkg_spatial_size [14, 14]" in capsys.readouterr().out
    state = torch.load(tmp_path / "trunk.pth", weights_only=True)
    encoder = {n: v for n, v in model.state_dict().items() if n.startswith(("patch", "pos_embed", "blocks"))}
    assert len(state) == len(encoder) and same(to_ours(state), encoder)
    inside = {f"image_encoder.trunk.{name}": value for name, value in state.items()}
    classifier = models.create("hiera_pico_96", abs_win=True)
    save_file(inside, tmp_path / "inside.safetensors")
    models.load_weights(classifier, tmp_path / "inside.safetensors", quiet=True)
    assert torch.equal(classifier.pos_embed_win, model.pos_embed_win)


def test_resampling_of_position_embeddings():
    table = torch.rand(1, 7 * 7, 4)
    assert torch.equal(resample(table, 1, (1, 7, 7)), table)
    flat = torch.full((1, 2 * 9, 4), 0.5)
    torch.testing.assert_close(resample(flat, 2, (5, 4, 6)), torch.full((1, 5 * 24, 4), 0.5))
    ramp = torch.arange(8.0).view(1, 8, 1)
    torch.testing.assert_close(resample(ramp, 8, (4, 1, 1)).flatten(), torch.tensor([0.5, 2.5, 4.5, 6.5]))
    rows = torch.arange(8.0).repeat_interleave(8).view(1, 64, 1)  # changes only along the rows
    bigger = resample(rows, 1, (1, 16, 24)).view(16, 24)
    torch.testing.assert_close(bigger, bigger[:, :1].expand(-1, 24))
    assert (bigger[:, 0].diff() > -1e-3).all()
    with pytest.raises(UserError, match="not those of a square input"):
        resample(torch.rand(1, 12, 4), 1, (1, 3, 4))


def test_absolute_window_embeddings_in_half_precision_are_resampled_and_clip_models_refuse_them():
    source = random_model("hiera_pico_96", abs_win=True, global_pos_size=(7, 7))
    state = {name: value.half() for name, value in source.state_dict().items()}
    target, whole = (models.create("hiera_pico_96", abs_win=True) for _ in range(2))
    assert models.load_weights(target, state, quiet=True).resampled == ("pos_embed",)
    models.load_weights(whole, {name: value.float() for name, value in state.items()}, quiet=True)
    assert torch.equal(target.pos_embed, whole.pos_embed)
    with pytest.raises(UserError, match=r"another kind of position embeddings .*; a clip model has plain"):
        models.load_weights(models.create("hiera_pico_16x64"), state, quiet=True)


@pytest.mark.parametrize(
    ("name", "size", "resampled"),
    [
        ("hiera_pico_96", (64, 160), {"pos_embed"}),
        ("mae_hiera_pico_96", 128, {"pos_embed", "decoder_pos_embed"}),
        ("hiera_pico_16x64", (8, 64, 64), {"pos_embed_temporal"}),
        (
            "mae_hiera_pico_16x64",
            (32, 96, 96),
            {"pos_embed_spatial", "pos_embed_temporal", "decoder_pos_embed"},
        ),
    ],
)
def test_loading_into_another_input_size(name, size, resampled):
    source, target = random_model(name), models.create(name, input_size=size)
    report = models.load_weights(target, source.state_dict(), quiet=True)
    assert set(report.resampled) == resampled
    assert not report.fresh
    assert not report.unused
    x = torch.rand(1, 3, *target.input_size)
    output = target(x)
    assert (output.loss if name.startswith("mae_") else output).isfinite().all()


def test_image_autoencoder_weights_inflate_to_clips():
    image = random_model("mae_hiera_pico_96", input_size=64)
    video = models.create("mae_hiera_pico_16x64").eval()
    report = models.load_weights(video, image.state_dict(), quiet=True)
    assert {"patch_embed.proj.weight", "pos_embed_temporal", "decoder_pred.weight"} <= set(report.inflated)
    assert not report.fresh
    assert not report.unused
    picture = torch.rand(1, 3, 64, 64)
    clip = picture.unsqueeze(2).expand(-1, -1, 16, -1, -1)
    still = video.patch_embed(clip, None, video.units) + video.positions()
    once = image.patch_embed(picture.unsqueeze(2), None, image.units) + image.positions()
    # The clip's tokens equal the image's except at the first step, which sees padding as frame -1.
    torch.testing.assert_close(still.unflatten(1, (8, 4))[:, 1:], once[:, None].expand(-1, 7, -1, -1, -1))
    # A patch's predictions have channels first in an image and last in a clip.
    latent = torch.rand(1, 1, 128)
    a = image.decoder_pred(latent).view(3, 256).T.flatten()
    torch.testing.assert_close(video.decoder_pred(latent).flatten(), a)


def test_a_clip_classifier_of_another_size_loads_an_image_autoencoder():
    model = models.create("hiera_pico_16x64")
    report = models.load_weights(model, random_model("mae_hiera_pico_96").state_dict(), quiet=True)
    assert report.resampled == ("pos_embed_spatial",)
    assert set(report.inflated) == {"patch_embed.proj.weight", "pos_embed_temporal"}
    assert all(name.startswith(("norm.", "head.")) for name in report.fresh)
    state, names = inflate(model.state_dict(), model)
    assert not names, "clip weights do not change"
    assert state.keys() == model.state_dict().keys()


def test_saved_and_loaded_models_give_equal_outputs(tmp_path):
    """A model that loaded a saved file gives the same outputs."""
    for name in ("hiera_pico_16x64", "mae_hiera_pico_16x64"):
        model = random_model(name)
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        again = models.create(name).eval()
        models.load_weights(again, tmp_path / "m.safetensors", quiet=True)
        x = torch.rand(1, 3, 16, 64, 64)
        mask = (torch.arange(32) % 4 == 0)[None] if name.startswith("mae_") else None
        with torch.no_grad():
            pairs = zip(run_ours(model, x, mask), run_ours(again, x, mask), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `body` after the listed `faults`: a status code, or "cut" for a broken connection."""

    body = b""
    faults: list = []  # noqa: RUF012
    requested: list = []  # noqa: RUF012

    def do_GET(self):
        self.requested.append(self.path)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: len(self.body) // 2] if fault == "cut" else self.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"model_state": random_model("mae_hiera_pico_96").state_dict()}, tmp_path / "weights.pth")
    Server.body, Server.faults, Server.requested = (tmp_path / "weights.pth").read_bytes(), [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


NAME = "mae_hiera_tiny_224:mae_in1k"


def test_official_weights_are_downloaded_once_with_retries(server, tmp_path, capsys):
    Server.faults += [503, "cut"]
    path = files.fetch(NAME, server, wait=0.01)
    assert path == tmp_path / "hub/checkpoints/mae_hiera_tiny_224.pth"
    assert path.read_bytes() == Server.body
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert path.with_suffix(".pth.sha256").read_text().strip() == hashlib.sha256(Server.body).hexdigest()
    assert files.fetch(NAME, server) == path
    assert Server.requested == ["/mae_hiera_tiny_224.pth"] * 3
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".sha256"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_official_weights_download_without_file_locks(server, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = files.fetch(NAME, server)
    assert path.read_bytes() == Server.body and files.fetch(NAME, server) == path
    warning = f"{path.parent} does not support file locks ({os.strerror(number)}): several processes"
    assert warning in capsys.readouterr().err
    assert len(Server.requested) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".sha256"]


def test_changed_official_weights_are_refused(server):
    path = files.fetch(NAME, server)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="has changed since its download"):
        files.fetch(NAME, server)


def test_a_failed_download_names_the_path_for_the_file(server):
    Server.faults += [404]
    with pytest.raises(UserError, match=r"put it at .*checkpoints/mae_hiera_tiny_224.pth"):
        files.fetch(NAME, server)
    assert len(Server.requested) == 1, "no retry when the file does not exist"
    with pytest.raises(UserError, match="put it at"):
        files.fetch(NAME, "http://127.0.0.1:9", wait=0.01)
    with pytest.raises(UserError, match="known: hiera_tiny_224:mae_in1k_ft_in1k"):
        files.fetch("hiera_tiny_224:mae_k400", server)


def test_weights_load_by_official_name(server, monkeypatch, capsys):
    monkeypatch.setattr(files, "URL", server)
    model = models.create("hiera_pico_96")
    models.load_weights(model, NAME)
    output = capsys.readouterr().out
    assert re.search(r"mae_hiera_tiny_224:mae_in1k: \d+ tensors loaded, 4 fresh \(norm.\*, head.\*\)", output)
