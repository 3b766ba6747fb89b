"""k-NN and linear probes of frozen features: python -m train.probe RUN.

The encoder computes the features of one center view per sample, for both splits. In the k-NN probe the
nearest training samples of each validation sample vote (Wu et al. 2018, arXiv 1805.01978). The linear probe
fits one linear layer to the training features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from models.layers import NormalizedInput
from pipelines.config import ANY, check_range
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import UserError, once_per_machine, run_cli
from pipelines.views import clip_notes
from train import distributed, ending, health
from train.config import Config
from train.console import log
from train.distributed import World
from train.evaluate import load_model, open_task, read_config, weights_of
from train.health import accuracy, linear
from train.rundir import Run
from train.task import check_damage

TEMPERATURE = 0.07


@dataclass(frozen=True)
class Arguments:
    """Probe a run's weights with a kNN vote and a linear layer."""

    run: tyro.conf.Positional[Path]
    """Run folder, of pretraining or of finetuning."""
    weights: Path | None = None
    """Other weights than the run's model.safetensors, for example best.safetensors."""
    data: Path | None = None
    """Other labelled shards than the run's."""
    k: int = 20
    """Neighbors that vote."""
    decay: float = 1e-3
    """Weight decay of the linear layer."""
    device: str = "auto"


def probe(arguments: Arguments) -> dict[str, float]:
    """Accuracy of both probes on the validation split, the same in every process of torchrun.

    A validation sample whose features are not all finite counts as wrong. Raises UserError when there is
    nothing to probe, or when features of the training split are not finite.
    """
    check_range("--k", arguments.k, (1, ANY))
    check_range("--decay", arguments.decay, (0, ANY))
    config = read_config(arguments.run, arguments.data)
    splits = [open_dataset(config.data.path, split) for split in ("train", "val")]
    if any((dataset.label < 0).any() or not len(dataset) for dataset in splits):
        raise UserError(
            f"{config.data.path} has samples without a class, or an empty split; give other --data"
        )
    weights = weights_of(arguments.run, arguments.weights)
    names = splits[0].info.classes
    run, model = open_encoder(config, weights, names, arguments.device)
    for note in clip_notes(splits[1], config.data):
        log(note)
    (known, classes), (queries, answers) = (features(config, run.world, model, split) for split in splits)
    if broken := int((~known.isfinite().all(1)).sum()):
        raise UserError(
            f"{broken} of {len(known)} training samples have features that are not finite; use other "
            "weights: WEIGHTS= (--weights)"
        )
    answers = torch.where(queries.isfinite().all(1), answers, -1)  # no probe gives -1
    voted = neighbors(known, classes, queries, arguments.k)
    fitted = linear(known, classes, queries, arguments.decay)
    return {"knn": accuracy(voted, answers), "linear": accuracy(fitted, answers)}


def open_encoder(
    config: Config, weights: Path, classes: Sequence[str], device: str
) -> tuple[Run, NormalizedInput]:
    """Join the other processes; return this process's run and the classifier whose features are computed.

    The classifier of an autoencoder has its encoder and its last norm.
    """
    run, task = open_task(config, classes, device)
    encoder = task.encoder() if task.encoder else task.model
    if task.encoder:
        config = replace(config, model=replace(config.model, reuse_encoder_norm=True))
    return run, load_model(encoder, config, weights, classes, run, whole=False)


def features(config: Config, world: World, model: NormalizedInput, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The input of the head for all samples but damaged ones, float32 [n, width], and classes, int64 [n].

    Raises UserError when too many samples are damaged.
    """
    found, classes = health.features(config, world, dataset, head_input(model), lambda: None)
    check_damage(config.data, dataset, len(classes))
    return found, classes


def head_input(model: NormalizedInput) -> Callable[[Tensor], Tensor]:
    """Of a classifier: pixels [b, ...] -> the input of its head [b, width]."""
    return lambda pixels: model.model.features(model.normalize(pixels))  # pyrefly: ignore


def neighbors(known: Tensor, classes: Tensor, queries: Tensor, k: int) -> Tensor:
    """The class that the k most similar of `known` give to each query: int64 [m]."""
    known, queries = functional.normalize(known, dim=1), functional.normalize(queries, dim=1)
    found = []
    for part in queries.split(1024):
        similarity, nearest = (part @ known.T).topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(part), int(classes.max()) + 1, device=part.device)
        found.append(votes.scatter_add_(1, classes[nearest], (similarity / TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(found)


def main() -> None:
    with once_per_machine():
        arguments = tyro.cli(Arguments, prog="python -m train.probe")
    found = ending.end_together(lambda: probe(arguments))
    if distributed.rank() == 0:
        for name, value in found.items():
            print(f"{name} {value:.4f}")


if __name__ == "__main__":
    run_cli(main)
