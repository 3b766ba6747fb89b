"""How much a model knows of the classes without being told: python -m train.probe RUN.

Features of the encoder, one centre view a sample, are taken of both splits. The kNN probe lets the training
samples nearest to each validation sample vote (Wu et al. 2018, arXiv 1805.01978); the linear probe fits one
linear layer to the training features. Neither changes the encoder: a pretraining run shows what it learns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from models.inputs import NormalizedInput
from pipelines.augment import to_device
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import UserError, run_cli
from pipelines.views import clip_notes
from train import distributed, ending, setup
from train.config import Config, FinetuneConfig, MaeConfig
from train.distributed import World
from train.evaluate import batches_of, check_damage, load_model, read_config, weights_of
from train.setup import Autocast

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
    if any((catalogue.label < 0).any() or not len(catalogue) for catalogue in splits):
        raise UserError(
            f"{config.data.path} has samples without a class, or an empty split; give other --data"
        )
    print("".join(f"{note}\n" for note in clip_notes(splits[1], config.data)), end="")
    weights = weights_of(arguments.run, arguments.weights)
    world = distributed.start(arguments.device, config.speed.timeout)
    torch.set_num_threads(distributed.torch_threads(world))
    autocast, _ = setup.precision(config, world)
    model = encoder(config, weights, splits[0].info.classes, world)
    (known, classes), (asked, answers) = (features(config, world, autocast, model, c) for c in splits)
    if broken := int((~known.isfinite().all(1)).sum()):
        raise UserError(
            f"{broken} of {len(known)} training samples have features that are not finite; use other "
            "weights: WEIGHTS= (--weights)"
        )
    answers = torch.where(asked.isfinite().all(1), answers, -1)  # which no probe ever gives
    voted = neighbours(known, classes, asked, arguments.k)
    fitted = linear(known, classes, asked, arguments.decay)
    return {"knn": accuracy(voted, answers), "linear": accuracy(fitted, answers)}


def accuracy(found: Tensor, answers: Tensor) -> float:
    """Share of equal entries."""
    return (found == answers).float().mean().item()


def encoder(config: Config, weights: Path, classes: Sequence[str], world: World) -> NormalizedInput:
    """A classifier with the run's encoder, to take its features; an autoencoder's last norm is kept."""
    if isinstance(config, MaeConfig):
        name = config.model.name.removeprefix("mae_")
        shared = {part: getattr(config, part) for part in ("data", "optim", "run", "speed")}
        config = FinetuneConfig(**shared, model=replace(config.model, name=name, reuse_encoder_norm=True))
    return load_model(config, weights, classes, world, exactly=False)


@torch.no_grad()
def features(
    config: Config, world: World, autocast: Autocast, model: NormalizedInput, catalogue: Dataset
) -> tuple[Tensor, Tensor]:
    """The features, float32 [n, width], and classes, int64 [n], of all samples but damaged ones, by id.

    Over several processes each computes its part, and all get the whole.
    """
    seen = torch.zeros(len(catalogue), device=world.device)
    table: Tensor | None = None  # one row for each sample of the split, zero until it is computed
    for batch in batches_of(config, world, catalogue, (1, 1)):
        rows = to_device(batch.valid.nonzero()[0], world.device)
        ids = to_device(batch.ids[batch.valid], world.device)
        with autocast():
            found = model.model.features(model.normalize(batch.pixels)).float()  # pyrefly: ignore
        table = found.new_zeros(len(catalogue), found.shape[1]) if table is None else table
        table[ids], seen[ids] = found[rows], 1.0
    assert table is not None  # every process has the same number of batches, and the split is not empty
    whole = distributed.total(seen) > 0
    check_damage(config, catalogue, int(whole.sum()))
    labels = to_device(torch.as_tensor(catalogue.label, dtype=torch.int64), world.device)
    return distributed.total(table)[whole], labels[whole]


def neighbours(known: Tensor, classes: Tensor, asked: Tensor, k: int) -> Tensor:
    """The class each of `asked` gets from its k most similar of `known`: int64 [m]."""
    known, asked = functional.normalize(known, dim=1), functional.normalize(asked, dim=1)
    found = []
    for part in asked.split(1024):
        likeness, nearest = (part @ known.T).topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(part), int(classes.max()) + 1, device=part.device)
        found.append(votes.scatter_add_(1, classes[nearest], (likeness / TEMPERATURE).exp()).argmax(dim=1))
    return torch.cat(found)


def linear(known: Tensor, classes: Tensor, asked: Tensor, decay: float, steps: int = 100) -> Tensor:
    """The class each of `asked` gets from a linear layer fitted to `known` by L-BFGS: int64 [m]."""
    mean, deviation = known.mean(dim=0), known.std(dim=0) + 1e-6
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
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
        return layer(asked).argmax(dim=1)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m train.probe")
    found = ending.end_together(lambda: probe(arguments))
    if distributed.rank() == 0:
        for name, value in found.items():
            print(f"{name} {value:.4f}")


if __name__ == "__main__":
    run_cli(main)
