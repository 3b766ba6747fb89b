"""`make preview`: the pixels, masks and mixed labels of the loader and of training, with class and source."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import Augment
from pipelines.dataset import open_dataset, read_batch
from pipelines.errors import UserError
from pipelines.loader import TrainLoader
from pipelines.machine import World
from tests.train_helpers import small
from tools import preview
from tools.fonts import fitted, length
from tools.pack import ImageOptions, pack_images
from tools.preview import Card, Section, below, beside, sheet
from train.config import Config, FinetuneConfig, MaeConfig
from train.presets import FINETUNE_PRESETS

ALONE = World(0, 1, torch.device("cpu"))


def first_rows(config: Config, count: int) -> np.ndarray:
    """The pixels of the first rows of step 1 of a run with this configuration."""
    data = open_dataset(config.data.path, "train")
    loader = TrainLoader(
        data, config.data, config.speed, ALONE, batch=config.optim.batch, seed=config.run.seed
    )
    return next(iter(loader)).pixels[:count].numpy()


def test_training_rows_are_those_of_step_1_and_masks_hide_the_share_of_the_recipe(
    images: Path, tmp_path: Path
):
    config = small("image-mae-pico", images, tmp_path, "run")
    assert isinstance(config, MaeConfig)
    section = preview.training(config, open_dataset(images, "train"), ALONE)
    assert section.title == "TRAINING: the first 12 of the 12 rows of step 1" and len(section.cards) == 12
    sources = set(read_batch(images / "train.arrow", ["source"])["source"].to_pylist())
    for pixels, card in zip(first_rows(config, 12), section.cards, strict=True):
        big = pixels.repeat(2, 0).repeat(2, 1)  # 64 pixels are enlarged to 128
        assert (card.picture[:, :128] == big).all()
        right = card.picture[:, -128:]
        units = [np.ptp(right[y : y + 64, x : x + 64], axis=(0, 1)).max() for y in (0, 64) for x in (0, 64)]
        assert sum(spread == 0 for spread in units) == 3  # of 4 units at ratio 0.6
        assert ((right == big) | (right == preview.GRAY)).all()
        name, source, view = card.captions
        assert source in sources and source.split("/")[1] == name and view.startswith("crop ")


def test_mixed_rows_show_the_input_of_the_model_and_both_classes(clips: Path, tmp_path: Path):
    config = small("video-ft-pico", clips, tmp_path, "run")
    assert isinstance(config, FinetuneConfig)
    config = replace(config, mixup=0.8, data=replace(config.data, repeats=2), smoothing=0.1)
    section = preview.training(config, open_dataset(clips, "train"), ALONE)
    assert len(section.cards) == 8 and section.lines[1] == "Lower strip: after mixup (0.8) or cutmix (0)."
    cards, differing = section.cards, []
    for number, card in enumerate(cards):
        name, label, *_ = card.captions
        other = number + (2 if number % 4 < 2 else -2)  # rows 0 and 1 are copies of one sample
        pairs = [text.split("% ") for text in label.removeprefix("label: ").split(" + ")]
        shares = {name: int(share) / 100 for share, name in pairs}
        assert {*shares} <= {name, cards[other].captions[0]} and sum(shares.values()) == pytest.approx(
            1, abs=0.011
        )
        if name != cards[other].captions[0]:  # else the label does not show the share
            own, partner = (cards[n].picture[: preview.CLIP_SIDE].astype(float) for n in (number, other))
            lower, share = card.picture[-preview.CLIP_SIDE :], shares.get(name, 0.0)
            assert np.abs(lower - (share * own + (1 - share) * partner)).max() < 3
            differing.append(share)
    assert len({*differing}) > 1


def test_evaluation_has_all_views_of_samples_from_all_of_the_split(clips: Path, tmp_path: Path):
    config = small("video-ft-pico", clips, tmp_path, "run")
    assert isinstance(config, FinetuneConfig)
    section = preview.evaluation(replace(config, views=(2, 3)), open_dataset(clips, "val"), ALONE)
    assert section.title == "EVALUATION: 2 of the 6 samples of the split val"
    words = "6 views from top to bottom: 2 start(s) in time x 3 square(s) from edge to edge, with a side of"
    assert section.lines[0].startswith(words.capitalize())
    listed = read_batch(clips / "val.arrow", ["source"])["source"].to_pylist()
    assert [card.captions[1] for card in section.cards] == [listed[0], listed[3]]
    assert {card.picture.shape for card in section.cards} == {(6 * 112 + 5 * 4, 8 * 112 + 7 * 4, 3)}


def test_the_command_writes_a_picture_next_to_the_runs(images: Path, tmp_path: Path):
    config = small("image-ft-pico", images, tmp_path / "runs", "a/b")
    path = preview.preview(config)
    assert path == tmp_path / "runs/preview-a-b.png"
    with Image.open(path) as picture:
        assert picture.width == 1952 and 400 < picture.height < 2000


def test_data_without_classes_is_refused_for_finetuning_only(images: Path, tmp_path: Path):
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted((images.parent / "source/val").rglob("*.JPEG"))):
        (tmp_path / f"flat/{number}.jpg").write_bytes(path.read_bytes())
    assert pack_images(tmp_path / "flat", tmp_path / "data", ImageOptions(workers=1)) == 0
    with pytest.raises(UserError, match="has samples without a class; finetuning needs labelled shards"):
        preview.preview(small("image-ft-pico", tmp_path / "data", tmp_path / "runs", "run"))
    config = small("image-mae-pico", tmp_path / "data", tmp_path / "runs", "run")
    section = preview.training(config, open_dataset(tmp_path / "data", "train"), ALONE)
    assert {card.captions[0] for card in section.cards} == {"no class"}


def test_the_text_names_every_augmentation():
    recipe = FINETUNE_PRESETS["image-ft-base"]
    for field in fields(Augment):
        changed = replace(recipe.data.augment, **{field.name: 1})
        other = replace(recipe, data=replace(recipe.data, augment=changed))
        assert preview.augmentation(other) != preview.augmentation(recipe), field.name


def test_cards_are_drawn_whole_and_do_not_overlap():
    colors = np.random.default_rng(0).integers(0, 255, (9, 3)).astype(np.uint8)
    made = [Card(np.full((50, 600, 3), color, np.uint8), ["class", "path" * 40, "view"]) for color in colors]
    drawn = np.asarray(
        sheet("title", "about", [Section("one", ["line"], made[:4]), Section("two", [], made[4:])])
    )
    for color in colors:
        y, x = np.nonzero((drawn == color).all(axis=2))
        assert (y.max() - y.min(), x.max() - x.min(), len(y)) == (49, 599, 50 * 600)
    assert length(fitted("x" * 400, 12, 300), 12) <= 300 and fitted("short", 12, 300) == "short"
    assert beside([made[0].picture] * 2).shape == (50, 1204, 3)
    assert below([made[0].picture] * 3).shape == (158, 600, 3)
