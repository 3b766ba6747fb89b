"""Evaluation, exact over any number of processes: python -m train.evaluate RUN [--weights FILE] [--data DIR].

Every sample of the split counts once, whatever the batch size and the number of processes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from torch import nn

from models.layers import NormalizedInput
from pipelines.errors import UNREADABLE, UserError, first_line, once_per_machine, run_cli
from pipelines.views import clip_notes
from train import distributed, ending, finetune, mae, rundir
from train.build import set_precision, warm_start
from train.config import Config, FinetuneConfig, MaeConfig, from_dict
from train.console import log
from train.metrics import best_of, best_text, read_csv
from train.rundir import Run
from train.task import Task, open_validation

TASKS: dict[type, Callable[..., Task]] = {MaeConfig: mae.task_of, FinetuneConfig: finetune.task_of}


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run's weights on the validation split."""

    run: tyro.conf.Positional[Path]
    """Run folder, such as runs/image-ft-pico."""
    weights: Path | None = None
    """Other weights than the run's model.safetensors."""
    data: Path | None = None
    """Other shards than the run's."""
    views: tuple[int, int] | None = None
    """Temporal x spatial views; default as in the run."""
    device: str = "auto"


def read_config(run: Path, data: Path | None = None) -> Config:
    """A run's configuration, with other shards if given. Raises UserError without a valid one."""
    path = run / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run folder made by train.mae or train.finetune")
    try:
        config = from_dict(json.loads(path.read_bytes()))
    except UNREADABLE as error:
        raise UserError(f"{path} is not a configuration ({first_line(error)}); restore it") from error
    return replace(config, data=replace(config.data, path=data)) if data else config


def weights_of(run: Path, other: Path | None) -> Path:
    """A run's final weights, or the `other` ones if given. Raises UserError if the file does not exist."""
    weights = other or run / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} does not exist; let the run finish, or name a file: WEIGHTS= (--weights)")
    return weights


def open_task(
    config: Config, classes: Sequence[str], device: str, folder: Path | None = None
) -> tuple[Run, Task]:
    """Join the other processes, set the precision, and make the task that a run was trained for.

    folder: where its evaluation writes predictions.parquet; None: nowhere.
    """
    run = Run(distributed.start(device, config.speed.timeout), folder)
    set_precision(config.speed, run.world.device)
    return run, TASKS[type(config)](config, run, classes)


def load_model(
    model: nn.Module, config: Config, weights: Path, classes: Sequence[str], run: Run, whole: bool = True
) -> NormalizedInput:
    """The model with these weights, ready to evaluate; `whole`: they must be all of its weights."""
    warm_start(model, replace(config.model, init=str(weights)), classes, whole)
    return NormalizedInput(model, config.data.frames).to(run.world.device).eval()


def evaluate(arguments: Arguments) -> dict[str, float]:
    """Load the run's configuration and weights and evaluate them; raises UserError.

    Under torchrun the processes share the samples, and all return the same scores.
    """
    config = read_config(arguments.run, arguments.data)
    if arguments.views:
        if not isinstance(config, FinetuneConfig):
            raise UserError(f"{arguments.run} is an autoencoder, which has no views; leave out --views")
        config = replace(config, views=arguments.views)
    weights = weights_of(arguments.run, arguments.weights)
    dataset = open_validation(config.data)
    if dataset is None:
        raise UserError(f"{config.data.path} has no validation samples")
    if isinstance(config, FinetuneConfig):  # a reconstruction has no classes
        rundir.check_classes(arguments.run, dataset.info)
    # The run's own predictions.parquet is kept when something else is evaluated.
    folder = None if arguments.weights or arguments.data or arguments.views else arguments.run
    classes = dataset.info.classes
    run, task = open_task(config, classes, arguments.device, folder)
    for note in clip_notes(dataset, config.data):
        log(note)
    model = load_model(task.model, config, weights, classes, run)
    scores = task.evaluate(model, dataset, lambda: None)
    if folder and isinstance(config, FinetuneConfig):
        log(f"{folder / 'predictions.parquet'}: the prediction of every sample; make report shows the errors")
    if not rundir.is_data_of(arguments.run, dataset.info):
        scores.pop("held_out", None)  # whether the run has trained on these samples is unknown
    return scores


def main() -> None:
    with once_per_machine():
        arguments = tyro.cli(Arguments, prog="python -m train.evaluate")
    scores = ending.end_together(lambda: evaluate(arguments))
    if distributed.rank() == 0:
        for name, value in scores.items():
            print(f"{name} {value:.6g}")
        rows, other = arguments.run / "metrics.csv", arguments.weights or arguments.data
        if not other and rows.exists() and (best := best_text(best_of(read_csv(rows)))):
            print(f"during training: {best} (best.safetensors)")


if __name__ == "__main__":
    run_cli(main)
