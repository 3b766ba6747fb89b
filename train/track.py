"""Live trackers (run.track): TensorBoard, Weights & Biases, MLflow, Trackio; each is imported only when used.

trackers.json in the run folder has each tracker's id of this run and the last step that it got. A resumed run
continues there, and steps that are done again are not sent again. A run that begins again at step 0, perhaps
with other settings, is a new one in the tracker.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from models.layers import NormalizedInput
from pipelines.errors import UNREADABLE, UserError, first_line
from pipelines.files import atomic_text, json_text
from train.config import Config, flatten, to_dict
from train.console import log
from train.metrics import COMMON, Row
from train.task import Task

Values = dict[str, float | Image.Image]
PROJECT = "hiera-train"
NAMES = {"loss": "train/loss", "loss_train": "train/loss", "loss_val": "val/loss"}
OF_TRAINING = ("time", "lr", *COMMON)  # all other columns come from an evaluation


class Tracker(NamedTuple):
    """A run in one tracker: its id, where the user finds it, and how to log values of a step and end it."""

    id: str
    where: str
    log: Callable[[Values, int], object]
    close: Callable[[], object]


# ---- one function per tracker, from the configuration, the id if the run has one, and the step to resume at


def tensorboard(config: Config, known: str, step: int) -> Tracker:
    """Event files in the run folder; after a resume TensorBoard discards the steps that are repeated."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(config.run.folder / "tensorboard"), purge_step=step + 1 if known else None)
    if not known:
        writer.add_text("settings", f"```\n{json_text(to_dict(config), indent=1)}\n```", 0)

    def send(values: Values, step: int) -> None:
        for name, value in values.items():
            if isinstance(value, Image.Image):
                writer.add_image(name, np.asarray(value), step, dataformats="HWC")
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", f"{_program('tensorboard')} --logdir {config.run.root}", send, writer.close)


def weights_and_biases(config: Config, known: str, step: int) -> Tracker:
    """A run on a W&B server; with WANDB_MODE=offline in the run folder, until `wandb sync` sends it."""
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError("run.track: wandb has no login; run `wandb login`, or set WANDB_MODE=offline")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=config.run.name,
        id=known or uuid.uuid4().hex[:8],
        resume="allow",
        dir=str(config.run.folder),
        config=to_dict(config),
        settings=wandb.Settings(console="off"),  # log.txt has the output
    )
    where = run.url or f"wandb sync {config.run.folder}/wandb/offline-run-*"
    return Tracker(run.id, where, lambda v, step: run.log(_with_pictures(v, wandb.Image), step), run.finish)


def mlflow(config: Config, known: str, step: int) -> Tracker:
    """A run on the server of MLFLOW_TRACKING_URI; without that variable in the folder mlruns of run.root."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow's own default needs SQLAlchemy
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its default takes minutes
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    where = os.environ.get("MLFLOW_TRACKING_URI") or (config.run.root / "mlruns").absolute().as_uri()
    client, name = MlflowClient(where), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if known:
        client.update_run(known, status="RUNNING")
    else:
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        known = client.create_run(number, run_name=config.run.name).info.run_id
        settings = flatten(to_dict(config)).items()
        client.log_batch(known, params=[Param(key, str(value)) for key, value in settings])

    def send(values: Values, step: int) -> None:
        now, metrics = int(time.time() * 1e3), []
        for name, value in values.items():
            if isinstance(value, Image.Image):
                client.log_image(known, value, key=name, step=step)
            else:
                metrics.append(Metric(name, value, now, step))
        client.log_batch(known, metrics=metrics)

    return Tracker(known, where, send, lambda: client.set_terminated(known))


def trackio(config: Config, known: str, step: int) -> Tracker:
    """A run in Trackio's database: local, or where TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say."""
    import trackio

    resume = "allow" if known else "never"  # another run may have had the same name
    name, settings = config.run.name, to_dict(config)
    run = trackio.init(project=PROJECT, name=name, resume=resume, config=settings, embed=False)
    where = f"{_program('trackio')} show --project {PROJECT}"
    return Tracker(run.id, where, lambda v, step: run.log(_with_pictures(v, trackio.Image), step), run.finish)


def _program(name: str) -> str:
    """The path of a program that belongs to this Python."""
    return os.path.relpath(Path(sys.executable).with_name(name))


def _with_pictures(values: Values, wrap: Callable[[Image.Image], object]) -> dict[str, object]:
    return {key: wrap(v) if isinstance(v, Image.Image) else v for key, v in values.items()}


TRACKERS = {  # what makes it, and its package
    "tensorboard": (tensorboard, "tensorboard"),
    "wandb": (weights_and_biases, "wandb"),
    "mlflow": (mlflow, "mlflow-skinny"),
    "trackio": (trackio, "trackio"),
}


# ---- all trackers of a run


class Tracks:
    """Sends to every tracker in a thread of its own, so that no step waits for a network."""

    def __init__(self, config: Config, step: int) -> None:
        self._path = config.run.folder / "trackers.json"
        self._sent: dict[str, dict] = {}
        self._failed: set[str] = set()
        with suppress(*UNREADABLE):
            for name, one in json.loads(self._path.read_text()).items():
                self._sent[name] = {"id": str(one["id"]), "step": int(one["step"])}
        self._trackers = {name: self._open(name, config, step) for name in dict.fromkeys(config.run.track)}
        atomic_text(self._path, json.dumps(self._sent) + "\n")
        self._thread = ThreadPoolExecutor(1, "track")

    def _open(self, name: str, config: Config, step: int) -> Tracker:
        make, package = TRACKERS[name]
        before: dict = {"id": "", "step": 0}
        if step or name == "tensorboard":  # the others cannot replace the rows of a start from step 0
            before |= self._sent.get(name, {})
        try:
            tracker = make(config, before["id"], step)
        except UserError:
            raise
        except ImportError as error:
            fix = f"run `make env`, or `pip install {package}`"
            raise UserError(f"run.track: {name} is not installed ({first_line(error)}); {fix}") from error
        except Exception as error:  # the four libraries have no common class of errors
            fix = f"correct its settings, or leave {name} out of --run.track"
            raise UserError(f"run.track: {name} does not start ({first_line(error)}); {fix}") from error
        self._sent[name] = {"id": tracker.id, "step": step if name == "tensorboard" else before["step"]}
        log(f"tracked by {name}: {tracker.where}")
        return tracker

    def row(self, row: Row) -> None:
        """Send a metric row, in the background."""
        step = int(row["step"] or 0)
        self._thread.submit(self._send, named(row), step, step - 1)

    def draw(self, task: Task, model: NormalizedInput, step: int) -> None:
        """Draw reconstructions of the first samples, and send them in the background, after their row."""
        if task.picture is not None:
            path = self._path.with_name("reconstruction.png")
            task.picture(path, model, task.validation or task.training, 6)
            pictures: Values = {"val/reconstruction": Image.open(path).convert("RGB")}
            self._thread.submit(self._send, pictures, step, step)

    def close(self) -> None:
        """Send what is left and end the trackers' runs."""
        for name, tracker in self._trackers.items():
            self._thread.submit(self._try, name, tracker.close)
        self._thread.shutdown()

    def _send(self, values: Values, step: int, last: int) -> None:
        """Send to the trackers that have nothing of a step after `last`.

        The step is noted before: after a kill the last row may be missing, and no row appears twice.
        """
        wanting = {name: one for name, one in self._trackers.items() if self._sent[name]["step"] <= last}
        for name in wanting:
            self._sent[name]["step"] = step
        with suppress(OSError):
            atomic_text(self._path, json.dumps(self._sent) + "\n")
        for name, tracker in wanting.items():
            self._try(name, lambda log=tracker.log: log(values, step))

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            if name not in self._failed:
                log(f"{name} failed ({first_line(error)}); training continues, and {name} may miss rows")
            self._failed.add(name)


def named(row: Row) -> Values:
    """The values of a row under the trackers' names, such as train/loss and val/acc."""
    values = {key: value for key, value in row.items() if value is not None and key != "step"}
    return {
        NAMES.get(key, f"{'train' if key in OF_TRAINING else 'val'}/{key}"): value
        for key, value in values.items()
    }
