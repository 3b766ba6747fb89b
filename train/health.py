"""Health of the features during pretraining: how well each stage tells samples apart.

At each evaluation the encoder sees the same few samples without a mask. `health_rank_stageN` is RankMe
(Garrido et al. 2023, arXiv 2210.02885) of a stage's features, averaged over their tokens: the exponential of
the entropy of their singular values, divided by their sum. It is 1 if all samples have the same direction.
`health_std_stageN` is their standard deviation over samples after scaling each to length 1, times the square
root of their width (Chen and He 2021, arXiv 2011.10566): 0 if all samples are equal, 1 if they point in all
directions. `health_probe` is the accuracy of a linear layer that is fitted to the last stage's features of
training samples, on the evaluation samples.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import NormalizedInput
from pipelines.augment import to_device
from pipelines.dataset import Dataset
from pipelines.loader import Batch
from train import distributed
from train.build import autocast_for
from train.config import Config
from train.console import log
from train.distributed import World
from train.metrics import HEALTH_COLUMNS
from train.task import Check, batches_of

CLASSES, PER_CLASS = 32, 16  # of each split, at most; so many samples of a class fit a linear layer
LEAST_RANK, LEAST_STD, LEAST_SHARE = 2.0, 0.05, 0.5  # docs/training.md gives the reason
FEWEST = 8  # samples: fewer have a low rank even with random weights
DECAY = 1e-3  # of the linear layer

Encode = Callable[[Tensor], Tensor]  # pixels of a batch [b, ...] -> features [b, width]


class History:
    """What earlier evaluations of the same command found, per stage."""

    def __init__(self) -> None:
        self.highest = [0.0] * 4  # standard deviations
        self.warned: set[int] = set()  # stages, from 1


def measure(
    config: Config,
    world: World,
    parts: tuple[Dataset, Dataset],
    history: History,
    model: NormalizedInput,
    check: Check,
) -> dict[str, float]:
    """The columns of the health of an autoencoder; warns once of each stage that has collapsed.

    parts: `fixed_parts` of the two splits; that of training is used only if all samples of both have a class.
    history: is updated. check: called once per batch. Columns are NaN where features are not finite.
    """
    encoder = model.model
    widths = [encoder.config.width << stage for stage in range(4)]  # pyrefly: ignore

    def encode(pixels: Tensor) -> Tensor:
        stages = encoder.encode(model.normalize(pixels))  # pyrefly: ignore
        return torch.cat([stage.float().mean((1, 2)) for stage in stages], dim=1)

    # The evaluation, which has just seen the whole split, has limited damage; here a sample is a large share.
    config = replace(config, data=replace(config.data, max_bad=1.0))
    model.eval()
    queries, answers = features(config, world, parts[1], encode, check)
    stages = queries.split(widths, dim=1)
    ranks, deviations = [list(map(one, stages)) for one in (effective_rank, deviation)]
    row = dict(zip(HEALTH_COLUMNS, (*ranks, *deviations), strict=False))
    if min(part.label.min() for part in parts) >= 0:
        known, classes = features(config, world, parts[0], encode, check)
        known, last = known[:, -widths[-1] :], stages[-1]
        finite = bool(known.isfinite().all() and last.isfinite().all())
        row["health_probe"] = accuracy(linear(known, classes, last, DECAY), answers) if finite else math.nan
    history.highest = list(map(max, history.highest, deviations))
    if len(queries) >= FEWEST:
        warn(ranks, deviations, row.get("health_probe"), history)
    return row


def warn(ranks: list[float], deviations: list[float], probe: float | None, history: History) -> None:
    """Log which stages have collapsed, each once."""
    stages = enumerate(zip(ranks, deviations, history.highest, strict=True), start=1)
    collapsed = {
        stage: f"stage {stage} (effective rank {rank:.3g}, standard deviation {std:.2g})"
        for stage, (rank, std, top) in stages
        if rank < LEAST_RANK or std < max(LEAST_STD, LEAST_SHARE * top)
    }
    if new := [text for stage, text in collapsed.items() if stage not in history.warned]:
        history.warned |= {*collapsed}
        still = "" if probe is None else f" (a linear probe of the last stage has {probe:.1%} accuracy)"
        log(
            f"warning: the features of {', '.join(new)} have collapsed: they hardly differ between "
            f"samples{still}; if the health columns of the next evaluations do not rise again, train with a "
            "lower optim.lr or a longer optim.warmup_epochs"
        )


# ---- features


@torch.no_grad()
def features(
    config: Config, world: World, dataset: Dataset, encode: Encode, check: Check
) -> tuple[Tensor, Tensor]:
    """The features, float32 [n, width], and classes, int64 [n], of all samples but damaged ones, by id.

    check: called once per batch. Each process computes a part, and all processes get all features.
    """
    seen = torch.zeros(len(dataset), device=world.device)
    table: Tensor | None = None  # one row for each sample of the split, zero until it is computed
    for batch, found in encoded(config, world, dataset, encode):
        check()
        rows = to_device(batch.valid.nonzero()[0], world.device)
        ids = to_device(batch.ids[batch.valid], world.device)
        table = found.new_zeros(len(dataset), found.shape[1]) if table is None else table
        table[ids], seen[ids] = found[rows], 1.0
    assert table is not None  # every process has the same number of batches, and the split is not empty
    whole = distributed.total(seen) > 0
    labels = to_device(dataset.label.astype(np.int64), world.device)
    return distributed.total(table)[whole], labels[whole]


@torch.no_grad()
def encoded(
    config: Config, world: World, dataset: Dataset, encode: Encode, views: tuple[int, int] = (1, 1)
) -> Iterator[tuple[Batch, Tensor]]:
    """The batches of this process with the features of their n samples, float32 [n, width].

    views: temporal x spatial views of a sample; its features are their mean.
    """
    autocast = autocast_for(config.speed, world.device)
    for batch in batches_of(config, world, dataset, views):
        with autocast():
            found = encode(batch.pixels).float()
        yield batch, found.unflatten(0, (-1, views[0] * views[1])).mean(1)


def fixed_parts(training: Dataset, evaluated: Dataset) -> tuple[Dataset, Dataset]:
    """The samples that the linear layer is fitted to, and those that it is evaluated on.

    Of a small evaluation split the first are not more than the second, if each class has enough: otherwise
    they would take longer than the evaluation.
    """
    queries = fixed_part(evaluated, PER_CLASS * CLASSES)
    fitting = PER_CLASS * min(CLASSES, len(training.info.classes))
    return fixed_part(training, max(fitting, len(queries))), queries


def fixed_part(dataset: Dataset, samples: int) -> Dataset:
    """The same at most `samples` samples of at most CLASSES classes at every call, evenly spaced."""
    every = max(1, math.ceil(len(dataset.info.classes) / CLASSES))
    ids = np.flatnonzero(dataset.label % every == 0)
    ids = ids if len(ids) else np.arange(len(dataset))
    ids = ids[np.linspace(0, len(ids) - 1, min(samples, len(ids))).round().astype(np.int64)]
    counts, starts = dataset.frame_counts(ids), dataset.first_frame[ids]
    first = np.concatenate([[0], np.cumsum(counts)])
    frames = np.arange(first[-1]) + np.repeat(starts - first[:-1], counts)
    columns = {name: getattr(dataset, name)[ids] for name in ("shard", "label", "width", "height")}
    columns |= {name: getattr(dataset, name)[frames] for name in ("offset", "size", "crc")}
    part = replace(dataset, first_frame=first, **columns)
    part.__dict__["_tar"] = dataset._tar  # the same open files: their number is limited
    return part


# ---- numbers


def effective_rank(values: Tensor) -> float:
    """RankMe of features [n, width]: 1 to min(n, width), NaN if any is not finite."""
    if not bool(values.isfinite().all()):
        return math.nan
    shares = torch.linalg.svdvals(values.double())
    shares = shares / shares.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def deviation(values: Tensor) -> float:
    """Standard deviation over samples of features [n, width] of length 1, times sqrt(width): 0 to 1."""
    scaled = functional.normalize(values.double(), dim=1)
    return float((scaled - scaled.mean(0)).square().sum(1).mean().sqrt())


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


def accuracy(found: Tensor, answers: Tensor) -> float:
    """Share of equal entries."""
    return (found == answers).float().mean().item()
