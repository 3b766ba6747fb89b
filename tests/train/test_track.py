"""Trackers get every row of a run once, also after a resume; a tracker that cannot start is a UserError."""

import json
import shutil
import signal
import sqlite3
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.machine import World
from tests.train.test_resume import changed, quick
from train import distributed, evaluate, loop, mae, rundir, track
from train.config import Config, RunConfig, from_dict
from train.console import parse
from train.metrics import read_csv
from train.optim import checkpoint_bytes
from train.presets import MAE_PRESETS
from train.task import create_model

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
Read = tuple[dict[tuple[int, str], float], list[int]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what trackers write outside of the run folder."""
    folder = tmp_path_factory.mktemp("track")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(folder))
        yield folder


def settings(images: Path, root: Path, name: str, *trackers: str) -> Config:
    config = quick(images, root, name, "image-mae-pico")  # rows every 2 steps, evaluations at 5 and 10
    return changed(config, run={"track": trackers})


def beat(run: Path) -> tuple[int, str]:
    values = json.loads((run / "heartbeat.json").read_text())
    return values["step"], values["state"]


@pytest.fixture(scope="module")
def tracked(images: Path, home: Path) -> Path:
    """A run with all trackers that stopped at step 7, lost that checkpoint, and repeated steps 5 to 7."""
    config = settings(images, home, "a", *NAMES)

    def stop_at_7(*given):
        task, calls = mae.make_task(*given), iter(range(1, 100))

        def loss(*batch):
            if next(calls) == 7:
                signal.raise_signal(signal.SIGTERM)
            return task.loss(*batch)

        return replace(task, loss=loss)

    assert loop.fit(config, stop_at_7) == signal.SIGTERM
    run = config.run.folder
    assert beat(run) == (7, "stopped")
    (run / "checkpoints/step-000000007.pt").unlink()
    assert loop.fit(config, mae.make_task) == 0
    assert "resumed from step 4" in (run / "log.txt").read_text()
    return run


def of_tensorboard(run: Path, identity: str) -> Read:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = events.Tags()
    values = [(e.step, name, e.value) for name in tags["scalars"] for e in events.Scalars(name)]
    assert len(values) == len({value[:2] for value in values})
    return {value[:2]: value[2] for value in values}, [e.step for e in events.Images("val/reconstruction")]


def records(path: Path) -> Iterator[bytes]:
    """The records of a W&B run file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    data, position, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # after a checksum of 4 bytes
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part; 2 and 3 are the first and middle parts
            yield parts
            parts = b""


def of_wandb(run: Path, identity: str) -> Read:
    from wandb.proto.wandb_internal_pb2 import Record

    values, pictures = {}, []
    files = sorted(run.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2
    for record in (Record.FromString(data) for path in files for data in records(path)):
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        step = record.history.step.num
        if items.get("val/reconstruction/_type") == "image-file":
            pictures.append(step)
        row = {(step, k): v for k, v in items.items() if not k.startswith(("_", "val/reconstruction/"))}
        assert not values.keys() & row.keys()
        values |= row
    return values, pictures


def of_mlflow(run: Path, identity: str) -> Read:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run.parent / "mlruns").as_uri())
    found = client.get_run(identity)
    assert found.info.status == "FINISHED" and found.data.params["optim.batch"] == "4"
    values = [
        (m.step, n, m.value) for n in found.data.metrics for m in client.get_metric_history(identity, n)
    ]
    assert len(values) == len({value[:2] for value in values})
    pictures = (path.path for path in client.list_artifacts(identity, "images"))
    steps = [int(path.split("+step+")[1].split("+")[0]) for path in pictures if path.endswith(".png")]
    return {value[:2]: value[2] for value in values}, sorted(steps)


def of_trackio(run: Path, identity: str) -> Read:
    values, pictures = {}, []
    with sqlite3.connect(run.parent / "trackio/hiera-train.db") as database:
        rows = database.execute("select step, metrics from metrics where run_id = ?", (identity,)).fetchall()
    for step, text in rows:
        for name, value in json.loads(text).items():
            if name == "val/reconstruction":
                pictures.append(step)
            else:
                assert (step, name) not in values
                values[step, name] = value
    return values, pictures


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_every_row_once_after_a_resume(tracked: Path, name: str):
    known = json.loads((tracked / "trackers.json").read_text())
    values, pictures = READERS[name](tracked, known[name]["id"])
    rows = read_csv(tracked / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10]
    wanted = {(row["step"], key): value for row in rows for key, value in track.named(row).items()}
    assert {"train/loss", "train/lr", "train/samples_per_s", "val/loss"} <= {key for _, key in wanted}
    assert values.keys() == wanted.keys()
    exact = {
        at: v for at, v in wanted.items() if at[1] in ("train/loss", "val/loss", "train/lr", "train/epoch")
    }
    assert {at: values[at] for at in exact} == pytest.approx(exact, rel=1e-6)
    assert pictures == [5, 10]


def test_names_in_other_scripts_are_readable_in_files_and_tensorboard(images: Path, tmp_path: Path):
    """A path that is not valid Unicode has the same value when it is read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(images, tmp_path, "猫", "tensorboard")
    config = replace(config, data=replace(config.data, path=Path("shards/b\udce4r")))
    config.run.folder.mkdir()
    rundir.record_start(config, {"classes": ["坏", "b\udce4r"]}, {})
    assert '"坏"' in (config.run.folder / "data.json").read_text(encoding="utf-8")
    assert '"猫"' in (config.run.folder / "config.json").read_text(encoding="utf-8")
    assert rundir.data_of(config.run.folder)["classes"] == ["坏", "b\udce4r"]
    assert evaluate.read_config(config.run.folder) == config
    track.tensorboard(config, "", 0).close()
    events = EventAccumulator(str(config.run.folder / "tensorboard")).Reload()
    (text,) = events.Tensors("settings/text_summary")
    assert '"猫"' in text.tensor_proto.string_val[0].decode()


def test_the_formula_gives_the_size_of_a_checkpoint(tracked: Path):
    config = from_dict(json.loads((tracked / "config.json").read_text()))
    model = create_model(config.data, config.model)
    for path in (tracked / "checkpoints").glob("*.pt"):
        assert checkpoint_bytes(model, config.optim) == pytest.approx(path.stat().st_size, rel=0.01)


def test_the_heartbeat_of_a_finished_run_says_so(tracked: Path):
    assert beat(tracked) == (10, "finished")
    assert not (tracked / ".heartbeat.tmp").exists()


def test_a_tracker_that_fails_is_reported_once_and_does_not_end_the_run(images, home, capsys):
    config = settings(images, home / "other", "failing", "mlflow")
    config.run.folder.mkdir(parents=True)
    tracks = track.Tracks(config, 0)
    shutil.rmtree(config.run.root / "mlruns")
    for step in (3, 6):
        tracks.row({"step": step, "loss": 1.0})
    tracks.close()
    assert capsys.readouterr().out.count("mlflow failed (") == 1


@pytest.mark.parametrize("text", ["", "[]", '{"tensorboard": {"step": "x"}}', '{"tensorboard": 3}'])
def test_a_damaged_list_of_trackers_begins_new_ones(images, home, text: str):
    config = settings(images, home / "damaged", "run", "tensorboard")
    config.run.folder.mkdir(parents=True, exist_ok=True)
    (config.run.folder / "trackers.json").write_text(text)
    track.Tracks(config, 4).close()
    known = json.loads((config.run.folder / "trackers.json").read_text())
    assert known == {"tensorboard": {"id": known["tensorboard"]["id"], "step": 4}}


def test_a_run_that_begins_again_at_step_0_is_a_new_one_in_the_tracker(images, home):
    from mlflow.tracking import MlflowClient

    config = settings(images, home / "again", "run", "mlflow")
    config.run.folder.mkdir(parents=True)
    for loss in (2.0, 1.0):  # with other settings, before the first checkpoint
        tracks = track.Tracks(config, 0)
        tracks.row({"step": 3, "loss": loss})
        tracks.close()
    known = json.loads((config.run.folder / "trackers.json").read_text())["mlflow"]["id"]
    client = MlflowClient((config.run.root / "mlruns").as_uri())
    assert [m.value for m in client.get_metric_history(known, "train/loss")] == [1.0]


def test_a_missing_package_or_login_is_an_error_before_the_first_step(images, home, monkeypatch):
    import wandb

    monkeypatch.setitem(sys.modules, "trackio", None)
    config = settings(images, home, "missing", "trackio")
    with pytest.raises(UserError, match=r"trackio is not installed .*`pip install trackio`"):
        loop.fit(config, mae.make_task)
    assert not config.run.folder.exists()
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(UserError, match=r"wandb has no login; run `wandb login`"):
        loop.fit(changed(config, run={"track": ("tensorboard", "wandb")}), mae.make_task)
    assert not config.run.folder.exists()


def test_only_rank_0_has_trackers(images, tmp_path):
    config = settings(images, tmp_path, "rank", *NAMES)
    world = World(1, 2, torch.device("cpu"))
    assert distributed.on_rank_0(world, lambda: track.Tracks(config, 0)) is None
    assert not config.run.folder.exists()


def test_any_subset_can_be_named_and_nothing_else(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "image-mae-pico", "--run.track", "wandb", "tensorboard"])
    assert parse(MAE_PRESETS, "train.mae").run.track == ("wandb", "tensorboard")
    with pytest.raises(
        UserError, match=r"run.track is 'comet'; it can be tensorboard, wandb, mlflow, trackio"
    ):
        RunConfig(track=("wandb", "comet"))
