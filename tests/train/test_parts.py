"""Unit tests of the training core: configuration, metrics, checkpoints, optimizer."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import models
from models.layers import NormalizedInput
from pipelines.config import Augment, DataConfig
from pipelines.dataset import read_info
from pipelines.errors import UserError
from pipelines.loader import blank_batch
from tests.train_helpers import small
from train import build, checkpoint, config, console, mae, optim
from train.card import model_card
from train.metrics import FINETUNE_COLUMNS, MAE_COLUMNS, MetricsWriter, read_csv
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

PRESETS = {**MAE_PRESETS, **FINETUNE_PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_equal_after_json_and_names_a_model(name: str):
    preset = PRESETS[name]
    assert config.from_dict(json.loads(json.dumps(config.to_dict(preset)))) == preset
    assert preset.model.name in models.list_models()
    assert preset.model.name.startswith("mae_") == (name in MAE_PRESETS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "name a preset first"),
        (["image-mae-bace"], "did you mean 'image-mae-base'"),
        (["image-mae-pico", "--optim.epoch", "3"], "did you mean '--optim.epochs'"),
        (["image-mae-pico", "--speed.precision", "fp8"], "speed.precision is 'fp8'; it can be auto, bf16"),
        (["image-mae-pico", "surplus"], "unknown argument 'surplus'"),
        (["image-ft-pico"], "'image-ft-pico' is for make train-ft; presets here: image-mae-pico"),
    ],
)
def test_wrong_arguments_give_one_line_with_a_hint(monkeypatch, words: list[str], expected: str):
    monkeypatch.setattr("sys.argv", ["train.mae", *words])
    with pytest.raises(UserError, match=expected) as caught:
        console.parse(MAE_PRESETS, "train.mae")
    assert "\n" not in str(caught.value)


def test_a_value_of_another_type_gives_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.mae", "image-mae-pico", "--optim.lr", "fast"])
    with pytest.raises(SystemExit) as caught:
        console.parse(MAE_PRESETS, "train.mae")
    assert caught.value.code == 2 and "--optim.lr" in capsys.readouterr().err


def test_overrides_change_the_configuration(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "image-mae-pico", "--optim.lr", "0.5", "--data.flip=0", "--run.seed", "7"]
    )
    parsed = console.parse(MAE_PRESETS, "train.mae")
    assert (parsed.optim.lr, parsed.data.flip, parsed.run.seed) == (0.5, 0.0, 7)
    assert parsed.run.name == "image-mae-pico"


def test_every_data_setting_is_equal_after_json():
    data = DataConfig(
        size=64, frames=8, stride=3, stride_fps=25.0, sampling="segments", clip_start=3, eval_split="train",
        scale=(0.3, 0.9), ratio=(0.8, 1.2), flip=0.1, interpolation="cubic",
        crop=0.9, repeats=2, same_clip=True, augment=Augment(layers=2, magnitude=7.0, jitter=0.4, erase=0.25),
    )  # fmt: skip
    values = json.loads(json.dumps(config.to_dict(replace(MAE_PRESETS["video-mae-base"], data=data))))
    assert config.from_dict(values).data == data


def test_settings_of_an_older_version_do_not_prevent_resuming():
    new = FINETUNE_PRESETS["video-ft-tiny-kinetics-reference"]
    old = json.loads(json.dumps(config.to_dict(new)))
    for key in ("clip_start", "eval_clip_start", "eval_split"):
        del old["data"][key]
    old |= {"protocol": "tiny-kinetics-reference", "gone": 1}
    old["optim"]["gone"] = 2
    assert config.differences(config.from_dict(old), new) == {}


def test_micro_batches_contain_whole_samples():
    def split(batch: int, micro: int, repeats: int, processes: int) -> tuple[int, int]:
        preset = MAE_PRESETS["image-mae-base"]
        preset = replace(preset, data=replace(preset.data, repeats=repeats))
        preset = replace(preset, optim=replace(preset.optim, batch=batch))
        preset = replace(preset, speed=replace(preset.speed, micro_batch=micro))
        return build.micro_batches(preset, processes)

    assert split(512, 32, 4, 2) == (32, 8)
    assert split(24, 7, 2, 2) == (6, 2)
    assert split(8, 1, 4, 2) == (4, 1)  # at least one sample
    with pytest.raises(UserError, match=r"optim\.batch 12 is not divisible by 2 processes x 4 repeats"):
        split(12, 4, 4, 2)


def test_only_settings_that_change_results_count_as_differences():
    old = MAE_PRESETS["image-mae-pico"]
    new = replace(old, speed=replace(old.speed, threads=9), run=replace(old.run, name="other"))
    assert config.differences(old, new) == {}
    new = replace(new, optim=replace(new.optim, lr=1.0))
    assert config.differences(old, new) == {"optim.lr": f"{old.optim.lr} -> 1.0"}


# ---- metrics


def row(step: int) -> dict:
    return {
        "time": step * 0.1,
        "step": step,
        "loss": 1 / (step + 3),
        "lr": 0.1,
        "samples": step * 8,
        "skipped": 0,
    }


def parquet_rows(run: Path) -> list[dict]:
    return pq.read_table(run / "metrics").to_pylist()


def test_csv_and_parquet_have_the_same_rows_also_after_resuming(tmp_path: Path):
    writer = MetricsWriter(tmp_path, FINETUNE_COLUMNS, 0)
    for step in (1, 2):
        writer.write(row(step))
    writer.commit()
    writer.write(row(3))  # not committed, as after a crash
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0.4,4,0.1")  # a line that the crash truncated
    writer = MetricsWriter(tmp_path, FINETUNE_COLUMNS, 2)
    for step in (3, 4):
        writer.write(row(step))
        writer.commit()
    assert len(list((tmp_path / "metrics").iterdir())) == 3
    writer.close()
    assert len(list((tmp_path / "metrics").iterdir())) == 1
    rows = read_csv(tmp_path / "metrics.csv")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert rows == parquet_rows(tmp_path)
    assert rows[0]["loss"] == row(1)["loss"] and rows[0]["acc"] is None


def test_damaged_lines_of_a_csv_are_left_out(tmp_path: Path):
    """Found by fuzzing: Python's csv module gave an error for a field of more than 131,072 characters."""
    lines = ["step,loss", "1,0.5", f'2,"{"9" * 200_000}', "3,0.25", "4"]
    (tmp_path / "metrics.csv").write_text("\r\n".join(lines) + "\r\n5,0.1")
    assert read_csv(tmp_path / "metrics.csv") == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    (tmp_path / "metrics.csv").write_text("x" * 200_000 + "\n1\n")
    assert len(read_csv(tmp_path / "metrics.csv")) == 1


def test_a_value_without_a_column_is_refused(tmp_path: Path):
    """Regression: it was left out of CSV and Parquet without a message."""
    writer = MetricsWriter(tmp_path, FINETUNE_COLUMNS, 0)
    with pytest.raises(AssertionError, match=r"no column for \['acc10'\]; add them to MAE_COLUMNS or FINE"):
        writer.write({**row(1), "acc10": 0.5})
    writer.write({**row(1), "acc": 0.5})
    assert len(read_csv(tmp_path / "metrics.csv")) == 1


def test_the_first_metric_columns_are_those_of_the_reference_trainer():
    assert MAE_COLUMNS[:5] == ("time", "step", "loss_train", "lr", "loss_val")
    assert FINETUNE_COLUMNS[:5] == ("time", "step", "loss", "lr", "acc")


def test_a_new_start_drops_rows_of_an_earlier_start_without_checkpoint(tmp_path: Path):
    writer = MetricsWriter(tmp_path, FINETUNE_COLUMNS, 0)
    writer.write(row(1))
    writer.close()
    MetricsWriter(tmp_path, FINETUNE_COLUMNS, 0).close()
    assert read_csv(tmp_path / "metrics.csv") == []


# ---- checkpoints

CPU = torch.device("cpu")


def test_only_the_last_checkpoints_are_kept(tmp_path: Path):
    (tmp_path / ".step-000000001.pt.tmp-99").write_bytes(b"killed while writing")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "w": torch.full((3,), float(step))}, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step-00000000{s}.{end}" for s in (2, 3) for end in ("pt", "sha256")]
    newest = checkpoint.choose(tmp_path)
    assert newest is not None and checkpoint.load(newest, CPU)["step"] == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no digest"])
def test_a_damaged_newest_checkpoint_is_renamed_with_a_warning(tmp_path: Path, capsys, damage: str):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "no digest":
        path.with_suffix(".sha256").unlink()
    else:
        path.write_bytes({"cut": content[:100], "flipped": content, "empty": b""}[damage])
    newest = checkpoint.choose(tmp_path)
    assert newest is not None and checkpoint.load(newest, CPU) == {"step": 1}
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 1 and "step-000000002.pt is damaged" in warnings[0]
    assert [p.name for p in tmp_path.glob("*.damaged")] == ["step-000000002.pt.damaged"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_after_a_fallback_the_configured_number_of_checkpoints_is_kept(tmp_path: Path, capsys, keep: int):
    """Damaged checkpoints of later steps must not cause the deletion of a new, valid one."""
    for step in range(4, 4 * (keep + 2), 4):
        path = checkpoint.save(tmp_path, step, {"step": step}, keep=keep + 1)
    path.write_bytes(b"damaged")
    newest = checkpoint.choose(tmp_path)
    assert newest is not None
    capsys.readouterr()
    step = checkpoint.load(newest, CPU)["step"]
    for later in (step + 1, step + 2):
        checkpoint.save(tmp_path, later, {"step": later}, keep=keep)
        newest = checkpoint.choose(tmp_path)
        assert newest is not None and checkpoint.load(newest, CPU)["step"] == later
        assert capsys.readouterr().out == ""
    assert len(list(tmp_path.glob("step-*.pt"))) == keep


def test_without_a_checkpoint_training_starts_from_the_beginning(tmp_path: Path):
    assert checkpoint.choose(tmp_path / "none") is None


def test_if_no_checkpoint_is_valid_no_file_changes(tmp_path: Path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2).write_bytes(b"damaged")
    before = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the checkpoints in .* is valid .*; restore one"):
            checkpoint.choose(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    for path in tmp_path.glob("step-*.pt"):
        path.rename(f"{path}.damaged")
    with pytest.raises(UserError, match="is valid"):
        checkpoint.choose(tmp_path)


def test_a_checkpoint_with_code_is_refused(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    checkpoint.save(tmp_path, 1, {"step": 1, "evil": Evil()}, keep=1)
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
        checkpoint.load(tmp_path / "step-000000001.pt", CPU)
    assert not (tmp_path / "owned").exists()


# ---- optimizer


def pico() -> nn.Module:
    torch.manual_seed(0)
    return models.create("hiera_pico_96", input_size=(64, 64), num_classes=3)


def test_only_matrices_have_weight_decay_and_the_rate_depends_on_depth():
    model = pico()
    settings = FINETUNE_PRESETS["image-ft-pico"].optim
    groups = optim.make_optimizer(model, settings).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g for g in groups for p in g["params"]}
    assert set(found) == set(names.values())
    for name, group in found.items():
        plain = name.endswith(".weight") and "norm" not in name
        assert group["weight_decay"] == (settings.weight_decay if plain else 0.0), name
    decay, last = settings.layer_decay, len(model.blocks) - 1  # pyrefly: ignore
    assert found["head.projection.weight"]["lr_scale"] == 1.0
    assert found[f"blocks.{last}.mlp.fc1.weight"]["lr_scale"] == pytest.approx(decay)
    assert found["blocks.0.mlp.fc1.weight"]["lr_scale"] == pytest.approx(decay ** (last + 1))
    assert found["patch_embed.proj.weight"]["lr_scale"] == pytest.approx(decay ** (last + 2))


def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(value: float) -> float:
        (model(torch.ones(1, 3)) * value).sum().backward()
        return optim.update(model, optimizer, clip_norm=1.0)[1].item()

    assert step(1.0) == 0
    before = [p.detach().clone() for p in model.parameters()]
    state = [s["exp_avg"].clone() for s in optimizer.state.values()]
    for bad in (float("nan"), float("inf")):
        assert step(bad) == 1
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(state, optimizer.state.values(), strict=True))
    assert step(1.0) == 0
    assert not torch.equal(before[0], next(iter(model.parameters())))


def test_gradients_are_clipped_and_the_norm_before_clipping_is_reported():
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    before = model.weight.detach().clone()
    (model(torch.ones(1, 4)) * 100).sum().backward()
    norm, _ = optim.update(model, optimizer, clip_norm=0.5)
    assert norm.item() == pytest.approx(200)
    assert (before - model.weight).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_the_seed_determines_the_initial_weights():
    def draw(seed: int) -> float:
        build.seed_weights(seed)
        return torch.rand(1).item()

    assert draw(5) == draw(5) and len({draw(seed) for seed in range(4)}) == 4


def test_starting_weights_that_do_not_exist_are_refused_before_processes_start(images: Path, tmp_path: Path):
    run = small("image-ft-pico", images, tmp_path, "run")
    run = replace(run, model=replace(run.model, init=str(tmp_path / "mae/model.safetensors")))
    with pytest.raises(UserError, match=r"^starting weights: there is no weights file at .*mae/model"):
        build.check(run)
    checkpoints = run.run.folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-000000004.pt").touch()
    build.check(run)  # a run that resumes does not read them


def test_the_code_in_a_model_card_makes_the_model_of_the_run(images: Path):
    preset = MAE_PRESETS["image-mae-pico"]
    for pixels in (False, True):
        settings = replace(preset, normalize_targets=not pixels, decoder_heads=8)
        line = re.search(
            r"^model = (create.*)$", model_card(settings, read_info(images), {}, 1), re.MULTILINE
        )
        assert line is not None
        made = eval(line[1], {"create": models.create}).config
        assert (made.normalize_targets, made.decoder_heads) == (not pixels, 8)


def test_a_damaged_sample_is_not_drawn(tmp_path: Path):
    model = models.create("mae_hiera_pico_96", input_size=32 * 2)
    batch = blank_batch(replace(MAE_PRESETS["image-mae-pico"].data, size=64), 3, torch.device("cpu"))
    batch.pixels[:] = torch.tensor([10, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1)
    batch = replace(batch, rows=batch.rows._replace(valid=np.array([True, False, True])))
    keep = torch.tensor([[0, 1]] * 3)
    mae.save_reconstructions(tmp_path / "drawn.png", NormalizedInput(model, 1), batch, keep)
    with Image.open(tmp_path / "drawn.png") as picture:
        part = int(picture.info["part height"])
        drawn = [picture.getpixel((9, y + mae.HEADER + 9))[0] for y in range(0, picture.height - part, part)]
    assert drawn == [10, 200]
