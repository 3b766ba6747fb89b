"""k-NN and linear probes of frozen features: python -m train.probe RUN.

The encoder computes the features of one centre view per sample, for both splits. In the k-NN probe the
nearest training samples of each validation sample vote (Wu et al. 2018, arXiv 1805.01978). The linear probe
fits one linear layer to the training features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from models.inputs import NormalizedInput
from pipelines.augment import to_device
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import UserError, once_per_machine, run_cli
from pipelines.loader import Batch
from pipelines.views import clip_notes
from train import distributed, ending
from train.build import autocast_for
from train.config import Config
from train.console import log
from train.distributed import World
from train.evaluate import load_model, open_task, read_config, weights_of
from train.rundir import Run
from train.task import batches_of, check_damage

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
    """Neighbours that vote."""
    decay: float = 1e-3
    """Weight decay of the linear layer."""
    device: str = "auto"


def probe(arguments: Arguments) -> dict[str, float]:
    """Accuracy of both probes on the validation split, the same in every process of torchrun.

    A validation sample whose features are not all finite counts as wrong. Raises UserError when there is
    nothing to probe, or when features of the training split are not finite.
    """
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
    voted = neighbours(known, classes, queries, arguments.k)
    fitted = linear(known, classes, queries, arguments.decay)
    return {"knn": accuracy(voted, answers), "linear": accuracy(fitted, answers)}


def accuracy(found: Tensor, answers: Tensor) -> float:
    """Share of equal entries."""
    return (found == answers).float().mean().item()


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


@torch.no_grad()
def encode(
    config: Config, world: World, model: NormalizedInput, dataset: Dataset, views: tuple[int, int] = (1, 1)
) -> Iterator[tuple[Batch, Tensor]]:
    """The batches of this process with the features of their n samples, float32 [n, width].

    views: temporal x spatial views of a sample; its features are their mean.
    """
    autocast = autocast_for(config.speed, world.device)
    for batch in batches_of(config, world, dataset, views):
        with autocast():
            found = model.model.features(model.normalize(batch.pixels)).float()  # pyrefly: ignore
        yield batch, found.unflatten(0, (-1, views[0] * views[1])).mean(1)


@torch.no_grad()
def features(config: Config, world: World, model: NormalizedInput, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The features, float32 [n, width], and classes, int64 [n], of all samples but damaged ones, by id.

    Each process computes a part, and all processes get all features.
    """
    seen = torch.zeros(len(dataset), device=world.device)
    table: Tensor | None = None  # one row for each sample of the split, zero until it is computed
    for batch, found in encode(config, world, model, dataset):
        rows = to_device(batch.valid.nonzero()[0], world.device)
        ids = to_device(batch.ids[batch.valid], world.device)
        table = found.new_zeros(len(dataset), found.shape[1]) if table is None else table
        table[ids], seen[ids] = found[rows], 1.0
    assert table is not None  # every process has the same number of batches, and the split is not empty
    whole = distributed.total(seen) > 0
    check_damage(config.data, dataset, int(whole.sum()))
    labels = to_device(dataset.label.astype(np.int64), world.device)
    return distributed.total(table)[whole], labels[whole]


def neighbours(known: Tensor, classes: Tensor, queries: Tensor, k: int) -> Tensor:
    """The class that the k most similar of `known` give to each query: int64 [m]."""
    known, queries = functional.normalize(known, dim=1), functional.normalize(queries, dim=1)
    found = []
    for part in queries.split(1024):
        similarity, nearest = (part @ known.T).topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(part), int(classes.max()) + 1, device=part.device)
        found.append(votes.scatter_add_(1, classes[nearest], (similarity / TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(found)


def linear(known: Tensor, classes: Tensor, queries: Tensor, decay: float, steps: int = 100) -> Tensor:
    """The class that a linear layer, fitted to `known` by L-BFGS, gives to each query: int64 [m]."""
    mean, deviation = known.mean(dim=0), known.std(dim=0) + 1e-6
    known, queries = (known - mean) / deviation, (queries - mean) / deviation
    layer = nn.Linear(known.shape[1], int(classes.max()) + 1, device=known.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(layer(known), classes) + decay * layer.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)  # pyrefly: ignore
    with torch.no_grad():
        return layer(queries).argmax(dim=1)


def main() -> None:
    with once_per_machine():
        arguments = tyro.cli(Arguments, prog="python -m train.probe")
    found = ending.end_together(lambda: probe(arguments))
    if distributed.rank() == 0:
        for name, value in found.items():
            print(f"{name} {value:.4f}")


if __name__ == "__main__":
    run_cli(main)
