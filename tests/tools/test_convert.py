"""Folders for transformers: the decoder's heads, and the image processor that `pipeline` needs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import models
from models.files import read_weights
from models.weights import load_weights
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from tests.train_helpers import small
from tools.convert import convert
from tools.predict import pack, probabilities
from train import loop, mae
from train.config import FinetuneConfig, MaeConfig, to_dict
from train.evaluate import load_model, open_task
from train.task import create_classifier

CLASSES = ("ant", "bee", "cat", "dog", "elk")


def wide_decoder(folder: Path) -> Path:
    """The file of an autoencoder whose decoder has 8 heads where the default is 4."""
    model = models.create("mae_hiera_pico_96", input_size=64, decoder_heads=8)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def heads_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["decoder_num_heads"]


def test_a_runs_decoder_keeps_its_heads(images, tmp_path, capsys):
    """Its export says so itself, also after the file was moved out of the run folder."""
    config = small("image-mae-pico", images, tmp_path, "run", epochs=0.5)
    assert isinstance(config, MaeConfig)
    assert loop.fit(replace(config, decoder_heads=8), mae.make_task) == 0
    moved = tmp_path / "moved.safetensors"
    shutil.copy(tmp_path / "run/model.safetensors", moved)
    for number, source in enumerate((tmp_path / "run", moved)):
        convert(str(source), tmp_path / f"hf-{number}", to="transformers")
        assert heads_of(tmp_path / f"hf-{number}") == 8
    assert "decoder_num_heads" not in capsys.readouterr().out
    ours = models.create("mae_hiera_pico_96", input_size=64, decoder_heads=8).eval()
    load_weights(ours, tmp_path / "hf-0", quiet=True)
    theirs = transformers.HieraForPreTraining.from_pretrained(tmp_path / "hf-0").eval()
    x, mask = torch.rand(1, 3, 64, 64), torch.tensor([[True, False, False, True]])
    with torch.no_grad():
        theirs.config.mask_ratio = theirs.hiera.embeddings.patch_embeddings.mask_ratio = 0.5
        torch.testing.assert_close(theirs(x, noise=(~mask).float()).loss, ours(x, mask).loss)
    for checkpoint in (tmp_path / "run/checkpoints").glob("*.pt"):
        assert not load_weights(ours, checkpoint, quiet=True).fresh
    default = models.create("mae_hiera_pico_96", input_size=64)
    with pytest.raises(UserError, match="decoder has 8 heads in the weights and 4 in the model"):
        load_weights(default, tmp_path / "hf-0", quiet=True)


def test_an_autoencoder_of_plain_pixels_has_the_same_loss_in_transformers(tmp_path):
    source = wide_decoder(tmp_path / "run")
    config = small("image-mae-pico", tmp_path, tmp_path, "run")
    assert isinstance(config, MaeConfig)
    config = replace(config, decoder_heads=8, normalize_targets=False, mask_ratio=0.75)
    (tmp_path / "run/config.json").write_text(json.dumps(to_dict(config)))
    convert(str(source), tmp_path / "hf", to="transformers")
    ours = models.create("mae_hiera_pico_96", input_size=64, decoder_heads=8, normalize_targets=False).eval()
    load_weights(ours, source, quiet=True)
    theirs = transformers.HieraForPreTraining.from_pretrained(tmp_path / "hf").eval()
    x, mask = torch.rand(1, 3, 64, 64), torch.tensor([[True, False, False, False]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, noise=(~mask).float()).loss, ours(x, mask).loss)


def test_decoder_heads_are_read_from_the_folder(tmp_path, capsys):
    source = wide_decoder(tmp_path / "run")
    config = small("image-mae-pico", tmp_path, tmp_path, "run")
    assert isinstance(config, MaeConfig)
    for chosen, expected in ((8, 8), (0, 4)):  # 0: the model's own
        (tmp_path / "run/config.json").write_text(json.dumps(to_dict(replace(config, decoder_heads=chosen))))
        convert(str(source), tmp_path / f"hf-{chosen}", to="transformers")
        assert heads_of(tmp_path / f"hf-{chosen}") == expected
    assert "assumed" not in capsys.readouterr().out
    convert(str(tmp_path / "hf-8"), tmp_path / "again.safetensors", to="ours")
    assert read_weights(tmp_path / "again.safetensors").decoder_heads == 8
    (tmp_path / "run/config.json").unlink()
    convert(str(source), tmp_path / "hf", to="transformers")
    assert heads_of(tmp_path / "hf") == 4
    printed = capsys.readouterr().out
    assert "decoder_num_heads 4 is assumed" in printed and "interpolation cubic are assumed" in printed


@pytest.mark.parametrize("target", ["run", "run/model.safetensors"])
def test_converting_into_the_source_folder_is_refused(tmp_path, target):
    source = wide_decoder(tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    for name in (source, source.parent):
        with pytest.raises(UserError, match=r"is the source itself; give another"):
            convert(str(name), tmp_path / target, to="transformers")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("interpolation", ["triangular", "cubic"])
def test_a_pipeline_predicts_what_evaluation_predicts(tmp_path, interpolation):
    config = small("image-ft-pico", tmp_path, tmp_path, "run")
    data = replace(config.data, size=64, crop=0.8, interpolation=interpolation)
    config = replace(config, data=data, model=replace(config.model, drop_path=0.0))
    assert isinstance(config, FinetuneConfig)
    run, folder = tmp_path / "run", tmp_path / "hf"
    classes = [CLASSES[0], "猫"]
    run.mkdir()
    torch.manual_seed(0)
    model = create_classifier(config.data, config.model, len(classes))
    with torch.no_grad():
        model.get_parameter("head.projection.weight").mul_(3000)  # so that pictures get different classes
    save_file(model.state_dict(), run / "model.safetensors")
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "data.json").write_text(json.dumps({"classes": classes}))
    convert(str(run), folder, to="transformers")
    assert '"1": "猫"' in (folder / "config.json").read_text()

    inputs = []
    for number, size in enumerate([(80, 80), (160, 160), (90, 200), (240, 131)]):  # width, height
        noise = np.random.default_rng(number).integers(0, 255, (9, 9, 3), np.uint8)
        inputs.append(tmp_path / f"{number}.jpg")
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(inputs[-1], quality=95)
    out = tmp_path / "packed"
    out.mkdir()
    assert pack(config, inputs, {}, out)[1] == [""] * len(inputs)
    here, task = open_task(config, classes, "cpu")
    ready = load_model(task.model, config, run / "model.safetensors", classes, here)
    wanted = probabilities(task, ready, open_dataset(out, "val"))

    answer = transformers.pipeline("image-classification", str(folder), device="cpu")
    found = torch.zeros(len(inputs), len(classes))
    for number, path in enumerate(inputs):
        for row in answer(str(path), top_k=None):
            found[number, classes.index(row["label"])] = row["score"]
    assert (wanted.max(0).values - wanted.min(0).values).max() > 0.1  # the pictures do differ
    torch.testing.assert_close(found[0], wanted[0], atol=0.01, rtol=0)  # 80 pixels: cropped, not resampled
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


def test_an_autoencoders_folder_prepares_pictures(tmp_path):
    convert(str(wide_decoder(tmp_path / "run")), tmp_path / "hf", to="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    prepared = processor(Image.new("RGB", (200, 100), (255, 0, 0)), return_tensors="pt")["pixel_values"]
    assert prepared.shape == (1, 3, 64, 64)
    torch.testing.assert_close(
        prepared[0, :, 0, 0], torch.tensor([0.515 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    )
    theirs = transformers.HieraForPreTraining.from_pretrained(tmp_path / "hf")
    assert theirs(prepared).loss.isfinite()
    assert set(load_file(tmp_path / "hf/model.safetensors")) >= {"decoder.mask_token"}
