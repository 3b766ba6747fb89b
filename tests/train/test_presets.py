"""The presets equal the paper's numbers in tests/train/paper_recipes.json and the page that lists them."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from tests.train_helpers import ROOT, small
from tools import recipes
from train import config, console, finetune, presets
from train.config import FinetuneConfig, to_dict
from train.distributed import World
from train.presets import FINETUNE_PRESETS, MAE_PRESETS, NOT_GIVEN
from train.rundir import Run

PRESETS = {**MAE_PRESETS, **FINETUNE_PRESETS}
PAPER = json.loads(Path(__file__).with_name("paper_recipes.json").read_text())
WHERE = {  # cell of the paper -> setting
    "optimizer": "optim.name",
    "betas": "optim.betas",
    "momentum": "optim.momentum",
    "nesterov": "optim.nesterov",
    "weight_decay": "optim.weight_decay",
    "lr": "optim.lr",
    "batch": "optim.batch",
    "warmup": "optim.warmup_epochs",
    "epochs": "optim.epochs",
    "layer_decay": "optim.layer_decay",
    "clip_norm": "optim.clip_norm",
    "drop_path": "model.drop_path",
    "dropout": "model.dropout",
    "repeats": "data.repeats",
    "crop": "data.scale",
    "aspect": "data.ratio",
    "flip": "data.flip",
    "frames": "data.frames",
    "stride": "data.stride",
    "fps": "data.stride_fps",
    "sampling": "data.sampling",
    "layers": "data.augment.layers",
    "magnitude": "data.augment.magnitude",
    "magnitude_std": "data.augment.magnitude_std",
    "erase": "data.augment.erase",
    "mask_ratio": "mask_ratio",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "smoothing": "smoothing",
    "views": "views",
    "view_side": "data.crop",  # share of the short side
    "pretrained": "pretrained_epochs",
}
COLUMNS = [
    (f"{table}, {column}", {**values["common"], **cells})
    for table, values in PAPER["tables"].items()
    for column, cells in values["columns"].items()
]


def wrong_cells(name: str, cells: dict[str, object]) -> dict[str, tuple[object, object]]:
    """The cells in which a preset differs from the paper: (paper's, preset's)."""
    flat = config.flatten(to_dict(PRESETS[name]))
    pairs = {cell: (value, flat[WHERE[cell]]) for cell, value in cells.items() if cell != "presets"}
    return {cell: pair for cell, pair in pairs.items() if not same(*pair)}


def same(typed: object, preset: object) -> bool:
    """Whether two cells are equal; numbers with the paper's precision."""
    if isinstance(typed, str | bool):
        return typed == preset
    return preset == pytest.approx(typed, rel=1e-3)


@pytest.mark.parametrize(("column", "cells"), COLUMNS, ids=[column for column, _ in COLUMNS])
def test_every_preset_has_the_papers_values(column, cells):
    empty = [cell for cell, value in cells.items() if value is None]
    for name in cells["presets"]:
        if empty:
            assert name not in PRESETS and name in NOT_GIVEN, "the paper gives no number"
            continue
        assert wrong_cells(name, cells) == {}
        assert PRESETS[name].optim.lr_batch == cells["batch"], "the rate is the paper's for the paper's batch"
        assert recipes.column_of(PRESETS[name]) == column


def test_every_preset_has_a_column_of_the_paper_or_a_named_source():
    listed = {name for _, cells in COLUMNS for name in cells["presets"]}
    own = {name for name in PRESETS if name.endswith(recipes.OWN)}
    differ = (listed - set(NOT_GIVEN)) ^ (set(PRESETS) - own)
    assert not differ, "neither in paper_recipes.json nor named by OWN in tools/recipes.py, or in both"
    for prefix, cells in PAPER["sources"]["MAE-st and SlowFast"].items():
        for name in listed - set(NOT_GIVEN):
            if name.startswith(prefix):
                assert wrong_cells(name, cells) == {}, name


def test_clip_finetuning_has_two_randaugment_operations_and_small_crops():
    """Regression: they had 4 operations and crop area [0.5, 1], as SlowFast's supervised configurations."""
    for name in FINETUNE_PRESETS:
        data = FINETUNE_PRESETS[name].data
        if name.startswith("video-ft-") and not name.endswith(recipes.OWN):
            assert (data.augment.layers, data.scale) == (2, (0.08, 1.0)), name


def test_docstrings_name_the_papers_tables():
    for make, table in (
        (presets.image_mae, "14a"),
        (presets.video_mae, "11a"),
        (presets.video_mae_ssv2, "12a"),
        (presets.image_ft, "14b"),
        (presets.video_ft, "11b"),
        (presets.video_ft_ssv2, "12b"),
    ):
        assert re.findall(r"table (\w+)", make.__doc__ or "") == [table]


@pytest.mark.parametrize("name", NOT_GIVEN)
def test_a_preset_without_numbers_in_the_paper_is_refused_with_the_reason(name, monkeypatch):
    program = "train.mae" if "-mae-" in name else "train.finetune"
    known = MAE_PRESETS if "-mae-" in name else FINETUNE_PRESETS
    monkeypatch.setattr("sys.argv", [program, name])
    with pytest.raises(UserError, match=rf"no preset '{name}': the paper gives no .* \(table 11[ab]\); use"):
        console.parse(known, program, NOT_GIVEN)
    for other in re.findall(r"video-\S+\d", NOT_GIVEN[name]):
        assert other in known


def test_the_page_lists_the_presets(tmp_path, monkeypatch):
    recipes.main(check=True)
    page = tmp_path / "which.md"
    page.write_text(recipes.PAGE.read_text().replace("`image-ft-large-400`", "`image-ft-large-500`"))
    monkeypatch.setattr(recipes, "PAGE", page)
    with pytest.raises(UserError, match=r"is out of date; run python -m tools\.recipes"):
        recipes.main(check=True)
    recipes.main()
    recipes.main(check=True)
    assert (
        "| `image-ft-large-400` | 14b, L after 400 | 224 x 224 | 0.001 at 1024 | 50, 5 | 0.9 | 0.2, 0 |"
        in page.read_text()
    )
    page.write_text("no markers")
    with pytest.raises(UserError, match="has no markers"):
        recipes.main()


def test_a_size_that_the_paper_does_not_have_is_refused_unless_own_names_it(monkeypatch):
    preset = MAE_PRESETS["image-mae-pico"]
    monkeypatch.setitem(recipes.MAE_PRESETS, "image-mae-example", preset)
    with pytest.raises(UserError, match=r"no size pico; add the name to OWN in tools/recipes\.py"):
        recipes.section()
    monkeypatch.setattr(recipes, "OWN", (*recipes.OWN, "example"))
    assert "`image-mae-example` | none | 96 x 96 | 0.00025 at 64 |" in recipes.section()


# ---- own recipes, in a file ------------------------------------------------------------------------------


def test_the_documented_file_adds_a_recipe(tmp_path, monkeypatch):
    page = (Path(recipes.PAGE).parent / "training.md").read_text()
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "_PRESETS" in block]
    (tmp_path / "my_recipes.py").write_text(text)
    monkeypatch.setattr(presets, "FINETUNE_PRESETS", known := dict(FINETUNE_PRESETS))
    runpy.run_path(str(tmp_path / "my_recipes.py"))
    monkeypatch.setattr("sys.argv", ["my_recipes.py", "image-ft-mine", "--data.size", "64"])
    made = console.parse(known, "train.finetune")
    assert (made.optim.epochs, made.data.size, made.run.name) == (30, 64, "image-ft-mine")


def test_a_script_is_started_in_several_processes(tmp_path):
    """Regression: torchrun was given the path of a script as the name of a module."""
    script = tmp_path / "my_recipes.py"
    script.write_text(
        "import os, sys\n"
        "if 'RANK' in os.environ:\n"
        "    print(f\"rank {os.environ['RANK']} {sys.argv[1:]}\\n\", end='')\n"
        "else:\n"
        "    from train import distributed\n"
        "    distributed.launch(2, 0)\n"
    )
    command = [sys.executable, script, "image-ft-mine", "--optim.lr", "1e-3"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    words = "['image-ft-mine', '--optim.lr', '1e-3']"
    assert sorted(done.stdout.splitlines()) == [f"rank 0 {words}", f"rank 1 {words}"]


# ---- the length of pretraining ---------------------------------------------------------------------------


def starting_from(folder: Path, pretraining: str, finetuning: str, **optim: float) -> FinetuneConfig:
    """`finetuning` from the weights of a run of `pretraining` that has only a config.json."""
    made = MAE_PRESETS[pretraining] if pretraining in MAE_PRESETS else FINETUNE_PRESETS[pretraining]
    made = replace(made, optim=replace(made.optim, **optim))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(made)))
    preset = FINETUNE_PRESETS[finetuning]
    return replace(preset, model=replace(preset.model, init=str(folder / "model.safetensors")))


@pytest.mark.parametrize(
    ("pretraining", "epochs", "finetuning", "message"),
    [
        (
            "image-mae-large",
            400.0,
            "image-ft-large",
            "400 epochs, .* for 1600; use RECIPE=image-ft-large-400",
        ),
        ("image-mae-large", 1600.0, "image-ft-large-400", "1600 epochs, .*; use RECIPE=image-ft-large"),
        ("video-mae-large", 800.0, "video-ft-large", "800 epochs, .* 3200; use RECIPE=video-ft-large-800"),
        ("video-mae-huge-3200", 3200.0, "video-ft-huge-800", "use RECIPE=video-ft-huge"),
        ("video-mae-base", 800.0, "video-ft-base", "gives numbers for 1600 and 3200 epochs only"),
        ("video-mae-base", 1.5, "video-ft-base", "gives numbers for 1600 and 3200 epochs only"),
        ("image-mae-large", 1600.0, "image-ft-large", ""),
        ("image-mae-large", 400.0, "image-ft-large-400", ""),
        ("image-mae-base", 400.0, "image-ft-base", ""),  # does not depend on the length
        ("video-mae-large", 3200.0, "video-ft-large", ""),
        ("video-ft-large", 100.0, "video-ft-large", ""),  # not pretraining
    ],
)
def test_a_run_warns_if_its_weights_were_pretrained_for_another_length(
    tmp_path, capsys, pretraining, epochs, finetuning, message
):
    config = starting_from(tmp_path / "made", pretraining, finetuning, epochs=epochs)
    finetune.warn_of_length(config)
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == bool(message)
    for note in notes:
        assert note.startswith(f"warning: {tmp_path}/made was pretrained for {epochs:g} epochs, and this")
        assert re.search(f"{message}$", note)


def test_there_is_no_warning_if_the_length_of_pretraining_is_unknown(tmp_path, capsys):
    preset = FINETUNE_PRESETS["video-ft-large"]
    for init in ("", "mae_hiera_large_16x224:mae_k400", str(tmp_path / "none.pth")):
        finetune.warn_of_length(replace(preset, model=replace(preset.model, init=init)))
    made = starting_from(tmp_path / "made", "video-mae-large", "video-ft-large")
    for text in ("", "{", "[]", '{"kind": "mae"}', '{"kind": "mae", "optim": {"epochs": "x"}}'):
        (tmp_path / "made" / "config.json").write_text(text)
        finetune.warn_of_length(made)
    assert capsys.readouterr().out == ""


def test_a_run_logs_the_warning_when_it_makes_its_task(tmp_path, images, capsys):
    made = starting_from(tmp_path / "made", "image-mae-large", "image-ft-large")
    run = small("image-ft-large", images, tmp_path, "run")
    run = replace(run, model=replace(run.model, init=made.model.init))
    assert isinstance(run, FinetuneConfig)
    finetune.make_task(run, Run(World(0, 1, torch.device("cpu"))))
    assert capsys.readouterr().out.count("use RECIPE=image-ft-large-400") == 1


def test_ssv2_presets_have_segments_no_flips_and_three_views():
    for name in ("video-mae-ssv2-large", "video-ft-ssv2-large", "video-ft-ssv2-large-32"):
        data = PRESETS[name].data
        assert (data.sampling, data.flip, data.path) == ("segments", 0.0, Path("shards/ssv2"))
    for name in ("video-ft-ssv2-large", "video-ft-ssv2-large-32"):
        preset = FINETUNE_PRESETS[name]
        assert (preset.optim.name, preset.optim.nesterov, preset.views) == ("sgd", True, (1, 3))
