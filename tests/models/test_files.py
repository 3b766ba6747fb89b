"""Users' weights files: wrapped, prefixed, sharded, in folders, damaged; and files that are not weights."""

import argparse
import dataclasses
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from models.files import read_weights
from pipelines.errors import UserError
from tests.models.test_weights import same
from tests.train_helpers import CLASSES as TRAINER_CLASSES
from tests.train_helpers import small
from train import evaluate, finetune, loop

CLASSES = [f"class {i}" for i in range(5)]


def pico(**overrides):
    """A classifier of one narrow block per stage."""
    tiny = {"width": 16, "stages": (1, 1, 1, 1), "input_size": 32, "num_classes": 5}
    return models.create("hiera_pico_96", **{**tiny, **overrides})


def loads(source, **given):
    """Load `source` into a new model; returns the report and the model's weights."""
    target = pico()
    report = models.load_weights(target, source, quiet=True, **given)
    return report, target.state_dict()


PREFIXES = (
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "model.",
    "net.",
    "backbone.",
    "model._orig_mod.module.net.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_removed(prefix, tmp_path):
    state = pico().state_dict()
    torch.save({"state_dict": {prefix + name: v for name, v in state.items()}}, tmp_path / "a.ckpt")
    for source in (tmp_path / "a.ckpt", {prefix + name: v for name, v in state.items()}):
        report, loaded = loads(source)
        assert same(loaded, state)
        assert not report.fresh and not report.unused


def test_a_prefix_of_only_the_encoder_is_removed():
    """A backbone below a head without prefix, and the counter that torch's AveragedModel adds."""
    state = pico().state_dict()
    named = {name if name.startswith("head.") else f"backbone.{name}": v for name, v in state.items()}
    assert same(loads(named)[1], state)
    averaged = torch.optim.swa_utils.AveragedModel(pico())
    report, loaded = loads(averaged.state_dict())
    assert same(loaded, averaged.module.state_dict()) and not report.unused


def test_a_prefix_is_removed_from_other_libraries_names():
    theirs = transformers.HieraForImageClassification(
        transformers.HieraConfig(
            embed_dim=16,
            image_size=[32, 32],
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
            num_labels=5,
        )
    )
    plain, _ = loads(theirs.state_dict())
    wrapped, _ = loads({f"model.module.{name}": v for name, v in theirs.state_dict().items()})
    assert wrapped == plain and not plain.fresh


def test_two_models_in_one_file_are_refused():
    state = pico().state_dict()
    both = {f"{model}.{name}": v for model in ("student", "teacher") for name, v in state.items()}
    with pytest.raises(UserError, match=r"2 models \(student\., teacher\.\); save one"):
        loads(both)
    twice = {f"backbone.{name}": v for name, v in state.items()} | {"norm.weight": torch.ones(128)}
    with pytest.raises(UserError, match=r"names both with and without the prefix backbone\.; save"):
        loads(twice)


@pytest.mark.parametrize("wrapper", ["model_state", "state_dict", "model", "module", "model_state_dict"])
def test_a_wrapped_state_dict_is_found(wrapper, tmp_path):
    state = pico().state_dict()
    torch.save({"epoch": 3, wrapper: {"state_dict": state}}, tmp_path / "a.pth")
    assert same(loads(tmp_path / "a.pth")[1], state)


@pytest.mark.parametrize(
    ("plain", "ema"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")]
)
def test_the_moving_average_is_preferred_and_reported(plain, ema, tmp_path):
    state, average = pico().state_dict(), pico().state_dict()
    torch.save({plain: state, ema: average}, tmp_path / "a.pth")
    report, loaded = loads(tmp_path / "a.pth")
    assert same(loaded, average)
    assert f"{ema} (the moving average) of the file was loaded; it also has {plain}" in str(report)
    torch.save({plain: state, ema: None}, tmp_path / "b.pth")
    report, loaded = loads(tmp_path / "b.pth")
    assert same(loaded, state) and "moving average" not in str(report)


def test_checkpoints_with_a_namespace_are_read(tmp_path):
    """timm and mae save their parsed arguments; mae and DeiT also save the optimizer."""
    state = pico().state_dict()
    arguments = argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), out="x", nested=argparse.Namespace(a=None))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    content = {"model": state, "optimizer": optimizer, "args": arguments, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    assert same(loads(tmp_path / "a.pth")[1], state)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path(PLACE).touch()".replace("PLACE", repr(self.place)),))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_does_not_run(tmp_path, legacy):
    evil = Evil()
    evil.place = str(tmp_path / "ran")
    for content in (
        {"model": pico().state_dict(), "args": evil},
        {"model": pico().state_dict(), "args": argparse.Namespace(inside=evil)},
    ):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=r"more than tensors \(\S*exec\).*could run code") as error:
            loads(tmp_path / "a.pth")
        assert "\n" not in str(error.value)
    (tmp_path / "b.pth").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError):
        loads(tmp_path / "b.pth")
    assert not (tmp_path / "ran").exists()


def shard(state, folder, suffix="safetensors"):
    """Write weights as two shards and an index; returns the index's path."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(state)
    parts = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, inside in parts.items():
        part = {name: state[name] for name in inside}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, ns in parts.items() for n in ns}}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights_are_read(tmp_path, suffix):
    state = pico().state_dict()
    index = shard(state, tmp_path, suffix)
    for source in (tmp_path, index):
        assert same(loads(source)[1], state)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{}/outside.safetensors", "..", "", 3])
def test_shards_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    name = name.format(tmp_path) if isinstance(name, str) else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"names .* as a shard; .* in its own folder"):
        loads(folder)


def test_messages_name_missing_and_damaged_shards(tmp_path):
    index = shard(pico().state_dict(), tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=r"-00002-of-00002\.safetensors, .* is missing; download"):
        loads(tmp_path)
    second.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is cut off"):
        loads(tmp_path)
    save_file({"a": torch.zeros(1)}, second)
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors lacks blocks\.\S+"):
        loads(tmp_path)
    for broken in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {}}'):
        index.write_text(broken)
        with pytest.raises(UserError, match=r"is not an index of weights.*; download"):
            loads(tmp_path)


def test_weights_are_found_in_a_folder(tmp_path):
    states = {name: pico().state_dict() for name in ("a.pth", "best.safetensors", "pytorch_model.bin")}
    with pytest.raises(UserError, match=r"no weights file.*model\.safetensors"):
        loads(tmp_path)
    torch.save(states["a.pth"], tmp_path / "a.pth")
    report, loaded = loads(tmp_path)
    assert same(loaded, states["a.pth"]) and str(report).startswith(f"{tmp_path}/a.pth: ")
    torch.save(states["a.pth"], tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"several weights files \(a\.pth, b\.pth\); name one"):
        loads(tmp_path)
    save_file(states["best.safetensors"], tmp_path / "best.safetensors")
    assert same(loads(tmp_path)[1], states["best.safetensors"])
    torch.save(states["pytorch_model.bin"], tmp_path / "pytorch_model.bin")
    assert same(loads(tmp_path)[1], states["pytorch_model.bin"])


def test_the_content_of_a_file_decides_its_format(tmp_path):
    state = pico().state_dict()
    save_file(state, tmp_path / "a.bin")
    torch.save(state, tmp_path / "b.safetensors")
    for name in ("a.bin", "b.safetensors"):
        assert same(loads(tmp_path / name)[1], state)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; download or copy it again"),
        (LFS, r"is a Git LFS pointer.*; run git lfs pull"),
        (b"\n<!DOCTYPE html><html>Log in</html>", r"is a web page.*; download the weights again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", r"is a web page"),
        (b"not weights at all", r"is not a weights file.*; give"),
        (b'{"weight": 1}', r"is not a weights file"),
    ],
)
def test_files_that_are_not_weights_are_refused(tmp_path, content, message):
    for path in (tmp_path / "safetensors/a.safetensors", tmp_path / "bin/a.bin"):
        path.parent.mkdir()
        path.write_bytes(content)
        for source in (path, path.parent):
            with pytest.raises(UserError, match=message) as error:
                read_weights(source)
            assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_truncated_files_are_refused_as_cut_off(tmp_path, kind, share):
    state, path = pico().state_dict(), tmp_path / "a.bin"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"a\.bin is cut off.*; download or copy it again"):
        read_weights(path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    model = pico()
    state = model.state_dict() | {"head.projection.bias": torch.tensor([0, 1, torch.nan, 3, 4])}
    state["blocks.3.norm1.weight"] = torch.full((64,), torch.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"values that are not finite.*blocks\.3\.norm1\.weight.*; "):
        models.load_weights(model, tmp_path / "a.safetensors")
    assert same(model.state_dict(), before)
    state["blocks.3.norm1.weight"] = torch.ones(64)
    with pytest.raises(UserError, match=r"head\.projection\.bias"):
        models.load_weights(model, {name: value.bfloat16() for name, value in state.items()})
    other = pico(num_classes=3)  # does not load the head
    models.load_weights(other, state, quiet=True)


def test_the_report_mentions_a_reused_head(tmp_path):
    state = pico().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assumed = "the head of 5 classes is reused; its classes are assumed to be the same"
    assert assumed in str(loads(tmp_path)[0])
    assert assumed in str(loads(tmp_path, classes=CLASSES)[0])
    renamed = [*CLASSES[:2], "other", *CLASSES[3:]]
    for file, content in (
        ("data.json", {"classes": renamed}),
        ("config.json", {"model_type": "hiera", "id2label": dict(enumerate(renamed))}),
    ):
        (tmp_path / file).write_text(json.dumps(content))
        report = str(loads(tmp_path, classes=CLASSES)[0])
        found = "the head of 5 classes is reused, but class 2 is 'other' in the weights, not 'class 2'"
        assert found in report and "assumed" not in report
        assert "is reused" not in str(loads(tmp_path, classes=renamed)[0])
        (tmp_path / file).unlink()
    placeholders = {i: f"LABEL_{i}" for i in range(5)}
    for text in ("no json", "[]", json.dumps({"model_type": "hiera", "id2label": placeholders})):
        (tmp_path / "config.json").write_text(text)
        assert assumed in str(loads(tmp_path, classes=CLASSES)[0])
    report = models.load_weights(pico(num_classes=4), tmp_path, quiet=True, classes=CLASSES[:4])
    assert "is reused" not in str(report)


def test_training_and_evaluation_compare_the_classes(images, tmp_path, capsys):
    config = small("image-ft-pico", images, tmp_path, "run", epochs=0.5)
    start = tmp_path / "start"
    start.mkdir()
    model = models.create("hiera_pico_96", input_size=64, num_classes=2)
    torch.save(model.state_dict(), start / "weights.pth")
    (start / "data.json").write_text(json.dumps({"classes": [TRAINER_CLASSES[0], "other"]}))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=str(start)))
    assert loop.fit(config, finetune.make_task) == 0
    note = (
        f"the head of 2 classes is reused, but class 1 is 'other' in the weights, not {TRAINER_CLASSES[1]!r}"
    )
    assert note in (tmp_path / "run/log.txt").read_text()
    capsys.readouterr()
    evaluate.evaluate(evaluate.Arguments(tmp_path / "run", device="cpu"))
    assert "is reused" not in capsys.readouterr().out, "a run has its own classes"
    evaluate.evaluate(evaluate.Arguments(tmp_path / "run", weights=start, device="cpu"))
    assert note in capsys.readouterr().out


def test_a_decoder_with_another_number_of_heads_is_refused(tmp_path):
    """The shapes are the same for any number of heads, so only metadata can show the number."""
    source = models.create("mae_hiera_pico_96", input_size=32, decoder_heads=8)
    about = json.dumps({"model": "mae_hiera_pico_96", "step": 1, "decoder_heads": 8})
    save_file(source.state_dict(), tmp_path / "a.safetensors", metadata={"hiera-train": about})
    target = models.create("mae_hiera_pico_96", input_size=32)
    with pytest.raises(UserError, match=r"8 heads in the weights and 4 in the model; .*decoder_heads 8"):
        models.load_weights(target, tmp_path / "a.safetensors", quiet=True)
    classifier = models.create("hiera_pico_96", input_size=32)
    models.load_weights(classifier, tmp_path / "a.safetensors", quiet=True)
    same_heads = models.create("mae_hiera_pico_96", input_size=32, decoder_heads=8)
    models.load_weights(same_heads, tmp_path / "a.safetensors", quiet=True)
    assert same(same_heads.state_dict(), load_file(tmp_path / "a.safetensors"))
