"""Probes: their votes and fits equal plain computations; runs of both kinds can be probed."""

import pytest
import torch
from safetensors.torch import load_file

from pipelines.errors import UserError
from tests.train_helpers import small
from tools.pack import ImageOptions, pack_images
from train import evaluate, finetune, loop, mae, probe


def test_neighbors_vote_with_weights_by_similarity():
    torch.manual_seed(0)
    known, classes, queries = torch.randn(50, 8), torch.randint(4, (50,)), torch.randn(20, 8)
    found = probe.neighbors(known, classes, queries, k=7)
    for row, predicted in zip(queries, found, strict=True):
        likeness = torch.cosine_similarity(row[None], known)
        votes = [0.0] * 4
        for index in likeness.argsort(descending=True)[:7].tolist():
            votes[int(classes[index])] += torch.exp(likeness[index] / 0.07).item()
        assert votes.index(max(votes)) == predicted
    assert (probe.neighbors(known, classes, known, k=1) == classes).all()
    assert probe.neighbors(known, classes, queries, k=500).shape == (20,)


def test_the_linear_layer_separates_only_separable_classes():
    torch.manual_seed(0)
    centers = 3 * torch.randn(3, 16)
    classes = torch.randint(3, (90,))
    points = centers[classes] + torch.randn(90, 16)
    assert probe.accuracy(probe.linear(points[:60], classes[:60], points[60:], 1e-3), classes[60:]) > 0.95
    noise = torch.randn(600, 16)
    classes = torch.randint(2, (600,))
    guessed = probe.accuracy(probe.linear(noise[:300], classes[:300], noise[300:], 1e-3), classes[300:])
    assert 0.4 < guessed < 0.6


def test_runs_of_both_kinds_can_be_probed(images, clips, tmp_path):
    pretrained = small("image-mae-pico", images, tmp_path, "mae", epochs=2.0)
    assert loop.fit(pretrained, mae.make_task) == 0
    found = probe.probe(probe.Arguments(tmp_path / "mae", device="cpu", k=5))
    assert set(found) == {"knn", "linear"} and min(found.values()) > 0.8  # the classes are dark and bright
    tuned = small("video-ft-pico", clips, tmp_path, "ft", epochs=1.0)
    assert loop.fit(tuned, finetune.make_task) == 0
    found = probe.probe(
        probe.Arguments(tmp_path / "ft", weights=tmp_path / "ft/best.safetensors", device="cpu")
    )
    assert min(found.values()) > 0.8


def test_the_probe_of_an_autoencoder_keeps_its_last_norm(images, tmp_path, monkeypatch):
    config = small("image-mae-pico", images, tmp_path, "run", epochs=0.4)
    assert loop.fit(config, mae.make_task) == 0
    loaded, load = [], probe.load_model
    monkeypatch.setattr(
        probe, "load_model", lambda *words, **more: loaded.append(load(*words, **more)) or loaded[0]
    )
    probe.probe(probe.Arguments(tmp_path / "run", device="cpu"))
    weights = load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(loaded[0].model.norm.weight, weights["encoder_norm.weight"])


def test_probing_shards_without_labels_is_refused(images, tmp_path):
    config = small("image-mae-pico", images, tmp_path, "run", epochs=0.4)
    assert loop.fit(config, mae.make_task) == 0
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, picture in enumerate(sorted((images.parent / "source").rglob("*.JPEG"))):
        (flat / f"{number}.jpg").write_bytes(picture.read_bytes())
    assert pack_images(flat, tmp_path / "unlabelled", ImageOptions(workers=1)) == 0
    there = evaluate.Arguments(tmp_path / "run", data=tmp_path / "unlabelled", device="cpu")
    assert evaluate.evaluate(there)["loss_val"] > 0
    with pytest.raises(UserError, match="samples without a class"):
        probe.probe(probe.Arguments(tmp_path / "run", data=tmp_path / "unlabelled", device="cpu"))
    with pytest.raises(UserError, match=r"--k is -1; it must be at least 1$"):
        probe.probe(probe.Arguments(tmp_path / "run", k=-1))
    with pytest.raises(UserError, match="name a run folder"):
        probe.probe(probe.Arguments(tmp_path / "nowhere"))
