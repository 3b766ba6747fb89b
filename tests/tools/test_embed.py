"""`make embed`: a row per sample, in order, with the features that the model computes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from models import create, load_weights
from models.layers import NormalizedInput
from pipelines.dataset import open_dataset, read_batch
from pipelines.errors import UserError
from pipelines.machine import World
from tests.train_helpers import CLASSES, small
from tools import embed
from train import task
from train.config import to_dict
from train.evaluate import TASKS
from train.rundir import Run

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(images: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a pretraining on images and a finetuning on clips, with random weights."""
    root = tmp_path_factory.mktemp("embed")
    for config in (small("image-mae-pico", images, root, "mae"), small("video-ft-pico", clips, root, "ft")):
        config.run.folder.mkdir()
        torch.manual_seed(0)
        model = TASKS[type(config)](config, Run(ALONE), CLASSES).model
        save_file(model.state_dict(), config.run.folder / "model.safetensors")
        (config.run.folder / "config.json").write_text(json.dumps(to_dict(config)))
    return root


def direct(run: Path, name: str, size: tuple[int, ...], views: tuple[int, int]) -> dict[str, np.ndarray]:
    """Features of a run's data computed with `models` alone, by split: float32 [n, width]."""
    config = embed.read_config(run)
    model = create(name, input_size=size, num_classes=2)
    load_weights(model, run / "model.safetensors", reuse_encoder_norm=True)
    whole, found = NormalizedInput(model, config.data.frames).eval(), {}
    for split in ("train", "val"):
        dataset = open_dataset(config.data.path, split)
        parts = []
        for batch in task.batches_of(config, ALONE, dataset, views, samples=20):
            with torch.no_grad():
                rows = model.features(whole.normalize(batch.pixels)).numpy()
            parts.append(rows.reshape(20, -1, rows.shape[1]).mean(1))
        found[split] = np.concatenate(parts)[: len(dataset)]
    return found


def test_every_sample_has_one_row_with_its_features(images: Path, runs: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(embed, "ROWS", 16)
    out = tmp_path / "features.parquet"
    embed.embed(embed.Arguments(runs / "mae", out, device="cpu"))
    table = pq.read_table(out)
    assert table["split"].to_pylist() == ["train"] * 40 + ["val"] * 14
    assert table["id"].to_pylist() == [*range(40), *range(14)]
    listed = [read_batch(images / f"{split}.arrow", ["source", "label"]) for split in ("train", "val")]
    assert table.select(["source", "label"]) == pa.Table.from_batches(listed)
    assert {CLASSES[row["label"]] == row["class_name"] for row in table.to_pylist()} == {True}
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[384]"
    wanted = direct(runs / "mae", "hiera_pico_96", (64, 64), (1, 1))
    found = np.stack(table["features"].to_numpy())
    np.testing.assert_allclose(found, np.concatenate([*wanted.values()]), rtol=1e-4, atol=1e-5)
    assert found.std(axis=0).max() > 0.1
    groups = pq.ParquetFile(out).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [18, 18, 16, 2]


def test_features_of_clips_are_the_mean_of_the_views_and_a_damaged_clip_has_none(
    clips: Path, runs: Path, tmp_path: Path
):
    shutil.copytree(clips, tmp_path / "clips")
    broken, out = 2, tmp_path / "features.parquet"
    damage(tmp_path / "clips", broken)
    wanted = direct(runs / "ft", "hiera_pico_16x64", (8, 64, 64), (2, 1))["val"]
    given = embed.Arguments(
        runs / "ft", out, data=tmp_path / "clips", split="val", views=(2, 1), device="cpu"
    )
    embed.embed(given)
    rows = pq.read_table(out)["features"].to_pylist()
    assert rows.pop(broken) is None
    np.testing.assert_allclose(np.array(rows), np.delete(wanted, broken, 0), rtol=1e-4, atol=1e-5)
    before = out.read_bytes()
    damage(tmp_path / "clips", 0, 4)
    with pytest.raises(UserError, match="samples are damaged, more than the 1 allowed"):
        embed.embed(given)
    assert out.read_bytes() == before and not [*tmp_path.glob(".*")]


def damage(root: Path, *samples: int) -> None:
    """Overwrite bytes of every frame of these validation clips."""
    dataset = open_dataset(root, "val")
    for sample in samples:
        with dataset.tar_path(int(dataset.shard[sample])).open("r+b") as tar:
            for offset in dataset.offset[slice(*dataset.first_frame[sample : sample + 2])]:
                tar.seek(int(offset) + 100)
                tar.write(b"damage")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"out": Path("nowhere/f.parquet")}, "nowhere/f.parquet cannot be written; name a file in a folder"),
        ({"out": Path("f.csv")}, "f.csv does not end in .parquet; name such a file with OUT="),
        ({"views": (0, 1)}, "--views is 0 1; both must be at least 1"),
        ({"split": "test"}, "has no split 'test', only train, val"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_is_computed(runs: Path, tmp_path: Path, given, message):
    words = {"run": runs / "mae", "out": tmp_path / "f.parquet", **given}
    with pytest.raises(UserError, match=message):
        embed.embed(embed.Arguments(**words))
