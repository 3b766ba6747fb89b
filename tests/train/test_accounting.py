"""Metric sums, data wait, MFU, NaN outputs, probes, and the environment variables of processes."""

import csv
import math
import os
import re
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from models.layers import NormalizedInput
from models.zoo import bf16_peak
from pipelines.dataset import open_dataset, read_batch
from pipelines.errors import UserError
from tests.fault_helpers import CLEAN
from tests.train.rank_helpers import evaluate_probe_and_embed
from tests.train_helpers import ROOT, module, small
from tools import embed
from train import build, distributed, evaluate, finetune, loop, mae, probe, task
from train.config import FinetuneConfig, MaeConfig
from train.distributed import World
from train.meters import Clock, Detail, Meters
from train.metrics import read_csv, score
from train.presets import MAE_PRESETS
from train.rundir import Run

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ---- sums


def add(sums: Meters, loss: float, norm: float, skipped: bool = False, bad: int = 0) -> None:
    sums.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(float(skipped)), bad)


def test_a_row_has_the_mean_loss_and_the_last_finite_gradient_norm():
    nan = float("nan")
    sums = Meters(CPU)
    add(sums, 1.0, 10.0)
    add(sums, 3.0, 0.1)
    add(sums, nan, nan, skipped=True)
    values = sums.flush().tolist()
    assert values[:6] == [2.0, pytest.approx(0.1, rel=1e-7), 0, 2, 1, 1]
    assert values[6:] == [1.0, 0.0, 3.0, 0.0, pytest.approx(nan, nan_ok=True), 1.0]  # loss, skipped
    add(sums, 5.0, 7.0, bad=3)
    assert sums.flush().tolist() == [5.0, 7.0, 3, 1, 1, 0, 5.0, 0.0]
    add(sums, nan, nan, skipped=True)
    add(sums, 1e30, float("inf"), skipped=True)
    loss, norm, *counts = sums.flush().tolist()[:6]
    assert loss != loss and norm == 7.0 and counts == [3, 0, 3, 2]


def test_sums_survive_a_resume_with_more_or_fewer_processes():
    sums = Meters(CPU)
    add(sums, 1.0, 4.0, bad=2)
    add(sums, float("inf"), float("nan"), skipped=True, bad=1)
    rows = torch.stack([sums.values, sums.values + torch.tensor([2.0, 0, 4, 0, 0, 0])])
    halves = [Meters(CPU) for _ in range(4)]
    for rank, half in enumerate(halves):
        half.restore(rows, rank, 4)
    assert halves[0].values.tolist() == [2.0, 4.0, 2.5, 1, 1, 1]  # 3 + 7 replaced rows = 4 processes x 2.5
    same = Meters(CPU)
    same.restore(rows, 1, 2)
    assert torch.equal(same.values, rows[1])


def test_the_wait_of_every_step_is_recorded(tmp_path: Path):
    """Also if a step right after a row waits longer than all steps before the row together."""
    clock, detail = Clock(0.0), Detail(tmp_path, 0, 0)
    waits = [0.25, 0.5, 1.0, 0.125, 4.0, 0.0, 8.0]
    shown = []
    for step, wait in enumerate(waits, 1):
        clock.waited += wait
        clock.steps += 1
        detail.add(step, torch.tensor(1.0), clock)
        if step in (2, 4, 6):
            shown.append(clock.row(step, 1, ALONE, 0.0)["data_wait_ms"])
        if step == 6:
            clock.skip()
    detail.write()
    with (tmp_path / "rank-0-from-000000000.csv").open() as file:
        assert [float(row["data_wait_ms"]) / 1e3 for row in csv.DictReader(file)] == waits
    assert shown == [375.0, 562.5, 2000.0]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of the device
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A1000", None),
        ("CPU", None),
    ],
)
def test_the_peak_is_known_by_exact_device_name(name: str, peak: float | None):
    assert bf16_peak(name) == (pytest.approx(peak, rel=1e-3) if peak else None)


# ---- evaluation


class Constant(nn.Module):
    """Returns `logits` [classes] for every picture, and NaN for the samples in `broken`."""

    def __init__(self, logits: list[float], broken: tuple[int, ...], rows: int) -> None:
        super().__init__()
        self.logits, self.broken, self.rows, self.seen = torch.tensor(logits), broken, rows, 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(self.seen, self.seen + len(pixels)).clamp(max=self.rows)
        self.seen += len(pixels)
        bad = torch.isin(ids, torch.tensor(self.broken)) | (ids == self.rows)  # also padding rows
        return torch.where(bad[:, None], float("nan"), self.logits)


def scores_of(config: FinetuneConfig, broken: tuple[int, ...], folder: Path) -> dict[str, float]:
    catalogue = open_dataset(config.data.path, "val")
    model = NormalizedInput(Constant([1.0, 0.0], broken, len(catalogue)), 1)
    return finetune.evaluate(config, Run(ALONE, folder), model, catalogue, lambda: None)


def test_a_sample_with_nan_outputs_is_wrong_and_the_loss_is_nan(images: Path, tmp_path: Path):
    """14 samples in batches of 6: the last batch has 4 padding rows, which are NaN and must not count."""
    config = small("image-ft-pico", images, tmp_path, "run")
    assert isinstance(config, FinetuneConfig)
    whole = scores_of(config, (), tmp_path)
    assert whole["acc"] == 0.5 and whole["loss_val"] == pytest.approx(0.8133, abs=1e-3)
    of_class = [np.flatnonzero(open_dataset(images, "val").label == label).tolist() for label in (0, 1)]
    broken = scores_of(config, (*of_class[0][:2], of_class[1][0]), tmp_path)
    assert broken["acc"] == 5 / 14 and broken["loss_val"] != broken["loss_val"]
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    wrong = {*of_class[0][:2], of_class[1][0]}
    assert {row["id"] for row in rows if row["class_1"] is row["probability_2"] is None} == wrong
    sure = {(row["class_1"], round(row["probability_1"], 4)) for row in rows if row["class_1"]}
    assert sure == {("dark things", 0.7311)}


def test_an_evaluation_without_classes_is_refused(images: Path, tmp_path: Path, monkeypatch):
    config = small("image-ft-pico", images, tmp_path, "run")
    catalogue = open_dataset(images, "val")
    unknown = replace(catalogue, label=np.where(np.arange(14) == 9, -1, catalogue.label))
    assert isinstance(config, FinetuneConfig)
    model = NormalizedInput(Constant([1.0, 0.0], (), 14), 1)
    with pytest.raises(UserError, match=r"val\.arrow has samples without a class; finetuning needs"):
        finetune.evaluate(config, Run(ALONE, tmp_path), model, unknown, lambda: None)
    assert not [*tmp_path.glob("*.parquet")]
    monkeypatch.setattr(finetune, "open_splits", lambda *_: (open_dataset(images, "train"), unknown))
    with pytest.raises(UserError, match=r"val\.arrow has samples without a class"):
        finetune.make_task(config, Run(ALONE))


def test_top_5_is_empty_with_five_classes_or_fewer(images: Path, tmp_path: Path):
    config = small("image-ft-pico", images, tmp_path, "run", epochs=1.0)
    assert isinstance(config, FinetuneConfig)
    assert set(scores_of(config, (), tmp_path)) == {"acc", "loss_val", "held_out"}
    assert loop.fit(config, finetune.make_task) == 0
    last = read_csv(tmp_path / "run" / "metrics.csv")[-1]
    assert last["acc5"] is None and last["acc"] is not None and last["held_out"] == 1
    assert "acc5" not in (tmp_path / "run" / "log.txt").read_text()


def test_weights_with_nan_outputs_are_never_the_best(images: Path, tmp_path: Path):
    config = small("image-ft-pico", images, tmp_path, "run", epochs=1.0)
    assert isinstance(config, FinetuneConfig)
    task = finetune.make_task(config, Run(ALONE))
    model = NormalizedInput(task.model, 1)
    (tmp_path / "run").mkdir()
    with torch.no_grad():
        task.model.get_parameter("head.projection.bias").fill_(float("nan"))
    scores = task.evaluate(model, open_dataset(images, "val"), lambda: None)
    assert scores["acc"] == 0.0 and scores["loss_val"] != scores["loss_val"]
    assert score(scores) == -math.inf < score({"acc": 0.0, "loss_val": 9.0})


def test_the_mae_loss_ignores_padding_rows_and_keeps_nan(images: Path, tmp_path: Path):
    config = small("image-mae-pico", images, tmp_path, "run")
    catalogue = open_dataset(images, "val")
    assert isinstance(config, MaeConfig)
    task = mae.make_task(config, Run(ALONE))
    assert 0 < task.evaluate(NormalizedInput(task.model, 1), catalogue, lambda: None)["loss_val"] < 100
    with torch.no_grad():
        next(task.model.parameters()).fill_(float("nan"))
    loss = task.evaluate(NormalizedInput(task.model, 1), catalogue, lambda: None)["loss_val"]
    assert loss != loss


def test_evaluation_uses_the_loader_settings_of_training(images: Path, tmp_path: Path, monkeypatch):
    """Both loaders use data.max_bad, speed.threads, speed.hw_decoder_load and speed.decode."""
    config = small("image-ft-pico", images, tmp_path, "run")
    config = replace(config, data=replace(config.data, max_bad=0.25))
    config = replace(config, speed=replace(config.speed, hw_decoder_load=0.3, threads=3, decode="window"))
    catalogue = open_dataset(images, "val")
    calls: list[tuple] = []

    def note(_dataset, data, decode, world, **_named) -> list:
        calls.append((data, decode, world))
        return []

    monkeypatch.setattr(task, "EvalLoader", note)
    monkeypatch.setattr(build, "TrainLoader", note)
    task.batches_of(config, ALONE, catalogue, (1, 1))
    build.training_batches(config, ALONE, catalogue, 1, 0)
    assert calls == [(config.data, config.speed, ALONE)] * 2


def damage(catalogue, samples: tuple[int, ...]) -> None:
    for sample in samples:
        with catalogue.tar_path(int(catalogue.shard[sample])).open("r+b") as tar:
            tar.seek(int(catalogue.offset[catalogue.first_frame[sample]]))
            tar.write(b"\0" * 40)


def test_evaluation_stops_at_the_configured_damage(tmp_path: Path):
    """2 of 14 samples are damaged: data.max_bad 0.2 skips them, 0.001 stops the evaluation."""
    from tests.train_helpers import make_images

    data = make_images(tmp_path / "made")
    catalogue = open_dataset(data, "val")
    damage(catalogue, (3, 4))
    config = small("image-ft-pico", data, tmp_path, "run")
    assert isinstance(config, FinetuneConfig)
    allowing = replace(config, data=replace(config.data, max_bad=0.2))
    scores_of(allowing, (), tmp_path)
    assert {*range(14)} - {*pq.read_table(tmp_path / "predictions.parquet")["id"].to_pylist()} == {3, 4}
    with pytest.raises(UserError, match="2 samples are damaged, more than the 1 allowed"):
        scores_of(config, (), tmp_path)
    # Each of two processes reads one of them, so only their sum exceeds the limit.
    with pytest.raises(UserError, match=r"2 of the 14 samples .* data\.max_bad"):
        task.check_damage(config.data, catalogue, 12)
    task.check_damage(config.data, catalogue, 13)


# ---- probes


def test_samples_with_nan_features_count_as_wrong(images: Path, tmp_path: Path, monkeypatch):
    nan = float("nan")
    known = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]])
    queries = torch.tensor([[nan, 1.0], [0.0, 1.0], [1.0, 0.0], [nan, nan]])
    classes = torch.tensor([0, 0, 1, 1])
    given = iter([(known, classes), (queries, torch.tensor([0, 0, 1, 0]))])
    monkeypatch.setattr(probe, "features", lambda *_: next(given))
    config = small("image-mae-pico", images, tmp_path, "run", epochs=0.4)
    assert loop.fit(config, mae.make_task) == 0
    wanted = probe.Arguments(tmp_path / "run", device="cpu", k=1)
    assert probe.probe(wanted) == {"knn": 0.5, "linear": 0.5}
    given = iter([(queries, classes), (known, classes)])
    with pytest.raises(UserError, match="2 of 4 training samples have features that are not finite"):
        probe.probe(wanted)


def test_two_processes_evaluate_probe_and_embed_like_one_and_print_once(images: Path, tmp_path: Path):
    config = small("image-ft-pico", images, tmp_path, "run", epochs=2.0)
    assert loop.fit(config, finetune.make_task) == 0
    run = tmp_path / "run"
    alone = evaluate.evaluate(evaluate.Arguments(run, device="cpu"))
    probed = probe.probe(probe.Arguments(run, device="cpu", k=5))
    embed.embed(embed.Arguments(run, tmp_path / "alone.parquet", device="cpu"))
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for free in (one, two, three):
            free.bind(("127.0.0.1", 0))
        ports = tuple(free.getsockname()[1] for free in (one, two, three))
    logs = [tmp_path / f"rank-{rank}.txt" for rank in range(2)]
    both = [
        CLEAN.Process(target=evaluate_probe_and_embed, args=(rank, ports, run, logs[rank]))
        for rank in range(2)
    ]
    by_one = pq.read_table(run / "predictions.parquet")
    (run / "predictions.parquet").unlink()
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert logs[1].read_text() == ""
    printed = dict(re.findall(r"^(\w+) ([\d.]+)$", logs[0].read_text(), re.M))
    assert float(printed["acc"]) == pytest.approx(alone["acc"], rel=1e-5)
    assert float(printed["loss_val"]) == pytest.approx(alone["loss_val"], rel=1e-5)
    assert f"{run}/predictions.parquet: the prediction of every sample" in logs[0].read_text()
    by_two = pq.read_table(run / "predictions.parquet")
    assert by_two["id"].to_pylist() == [*range(14)] and by_two.schema == by_one.schema
    catalogue = read_batch(images / "val.arrow", ["source", "label", "class_name"])
    for column in catalogue.schema.names:
        assert by_two[column].to_pylist() == catalogue[column].to_pylist()
    for table in (by_one, by_two):
        rows = table.to_pylist()
        assert sum(row["class_1"] == row["class_name"] for row in rows) / 14 == alone["acc"]
        assert [row["class_2"] for row in rows] == by_one["class_2"].to_pylist()
        chances = [(row["probability_1"], row["probability_2"]) for row in rows]
        assert all(first >= second and first + second == pytest.approx(1) for first, second in chances)
    assert float(printed["knn"]) == pytest.approx(probed["knn"], abs=1e-4)
    assert float(printed["linear"]) == pytest.approx(probed["linear"], abs=1e-4)
    one, two = (pq.read_table(tmp_path / name) for name in ("alone.parquet", "features.parquet"))
    found, wanted = (np.stack(table["features"].to_numpy()) for table in (two, one))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert two.drop_columns("features") == one.drop_columns("features") and len(one) == 54


def test_features_are_in_the_order_of_the_samples_without_duplicates(images: Path, tmp_path: Path):
    config = small("image-ft-pico", images, tmp_path, "run")
    catalogue = open_dataset(images, "val")
    assert isinstance(config, FinetuneConfig)
    model = NormalizedInput(finetune.make_task(config, Run(ALONE)).model, 1).eval()
    found, labels = probe.features(config, ALONE, model, catalogue)
    assert len(found) == 14 and labels.tolist() == catalogue.label.tolist()
    for part in task.batches_of(config, ALONE, catalogue, (1, 1)):
        wanted = model.model.features(model.normalize(part.pixels))[: part.valid.sum()]  # pyrefly: ignore
        torch.testing.assert_close(found[part.ids[part.valid]], wanted)


# ---- environment


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK"),
        ({"LOCAL_RANK": ""}, "RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, "LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK is 2",
        ),
    ],
)
def test_incomplete_torchrun_variables_give_one_line(
    images: Path, tmp_path: Path, monkeypatch, given: dict[str, str], printed: str
):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config = small("image-mae-pico", images, tmp_path, "run")
    for start in (lambda: loop.main(config, mae.make_task), lambda: distributed.start("cpu")):
        with pytest.raises(UserError, match=printed) as caught:
            start()
        assert "torchrun" in str(caught.value) and "\n" not in str(caught.value)


def test_a_complete_set_of_launcher_variables_is_used(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert not distributed.under_torchrun()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert distributed.under_torchrun()
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        distributed.under_torchrun()


@pytest.mark.parametrize(
    ("part", "values", "printed"),
    [
        ("run", {"max_skipped": 0}, r"run\.max_skipped is 0; it must be at least 1$"),
        ("run", {"name": "x" * 300}, r"run\.name .* 300 bytes.*at most 255"),
        ("run", {"name": "ü" * 128}, r"run\.name .* 256 bytes.*at most 255"),
        ("speed", {"hw_decoder_load": 1.5}, r"speed\.hw_decoder_load is 1\.5"),
        ("speed", {"decode": "roi"}, r"speed\.decode is 'roi'; it can be whole, window"),
        ("speed", {"threads": -1}, r"speed\.threads is -1"),
        ("speed", {"eval_batch": -1}, r"speed\.eval_batch is -1"),
        ("optim", {"clip_norm": -1.0}, r"optim\.clip_norm is -1"),
    ],
)
def test_settings_out_of_range_give_one_line(part: str, values: dict, printed: str):
    preset = MAE_PRESETS["image-mae-pico"]
    with pytest.raises(UserError, match=printed) as caught:
        replace(getattr(preset, part), **values)
    assert "\n" not in str(caught.value)
    assert replace(preset.run, name="x" * 255).folder


@pytest.mark.parametrize("moment", ["train", "numpy"])
def test_ctrl_c_during_imports_prints_one_line(moment: str):
    """The signal is sent once the module `moment` is imported; -X importtime shows when."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = module("train.mae", "image-mae-pico")
    command[1:1] = ["-X", "importtime"]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # background processes may ignore SIGINT
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == moment:
            process.send_signal(signal.SIGINT)
            break
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait(60) == 130
    assert len(rest) == 1 and rest[0].startswith("interrupted")
