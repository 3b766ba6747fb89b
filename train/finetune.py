"""Supervised finetuning: python -m train.finetune PRESET [--overrides].

python -m train.finetune image-ft-base --model.init runs/image-mae-base/model.safetensors --speed.processes 4
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.layers import NormalizedInput
from pipelines import order
from pipelines.augment import to_device
from pipelines.dataset import Dataset, read_batch
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write
from pipelines.loader import Batch
from train import distributed, loop
from train.build import autocast_for
from train.config import FinetuneConfig
from train.console import log, parse
from train.metrics import FINETUNE_COLUMNS
from train.presets import FINETUNE_PRESETS, NOT_GIVEN
from train.rundir import Run
from train.task import Check, Predictions, Task, batches_of, check_damage, create_classifier, open_splits

KEPT = 5  # classes per sample that an evaluation keeps
FEW = 100  # evaluated samples below which a run warns
# Columns of `draw_pairs`: the partner's share of the label, of the pixels outside the box, and the box.
LABEL, OUTSIDE, TOP, BOTTOM, LEFT, RIGHT = range(6)


def make_task(config: FinetuneConfig, run: Run) -> Task:
    """Finetuning on the configured data; raises UserError unless every training sample has a class."""
    from models.zoo import forward_macs

    train, validation = open_splits(config, run)
    for split in (train, validation or train):
        check_labels(split)
    warn_of_few(validation or train)
    warn_of_length(config)
    task = task_of(config, run, train.info.classes)
    if config.freeze == "trunk":
        freeze_trunk(task.model)
    macs = forward_macs(task.model.config)  # pyrefly: ignore
    # Forward, and twice that backward unless the trunk is frozen.
    operations = (2.0 if config.freeze == "trunk" else 6.0) * macs * config.optim.batch
    return replace(task, train=train, validation=validation, operations=operations)


def task_of(config: FinetuneConfig, run: Run, classes: Sequence[str]) -> Task:
    """A classifier of `classes` with its loss and evaluation."""
    return Task(
        model=create_classifier(config.data, config.model, len(classes)),
        loss=partial(classifier_loss, config, len(classes)),
        row_losses=partial(classifier_loss, config, len(classes), reduction="none"),
        evaluate=partial(evaluate, config, run),
        columns=FINETUNE_COLUMNS,
        loss_column="loss",
        mixed=2 if config.mixup or config.cutmix else 1,
        probabilities=partial(probabilities, config, run),
    )


def check_labels(split: Dataset) -> None:
    """Raise UserError unless every sample has a class, of two or more."""
    if len(split.info.classes) == 1:
        raise UserError(f"{split.info.root} has only one class; finetuning needs data with two or more")
    if (split.label < 0).any():
        raise UserError(f"{split.catalogue} has samples without a class; finetuning needs labelled shards")


def warn_of_few(evaluated: Dataset) -> None:
    """Warn if the evaluated split is so small that the accuracy is coarse."""
    if note := note_of_few(len(evaluated)):
        log(f"warning: {note}; pack more of the data for validation (--val-fraction)")


def note_of_few(count: int) -> str:
    """That the accuracy of `count` evaluated samples is coarse; empty if it is not."""
    if not 0 < count < FEW:
        return ""
    return (
        f"only {count} samples are evaluated: acc changes in steps of {1 / count:.2g}; small differences "
        "may be chance"
    )


def most_frequent(labels: np.ndarray) -> int:
    """How many of the samples have the most frequent class. labels: int64 [n]."""
    return int(np.unique(labels, return_counts=True)[1].max(initial=0))


def warn_of_length(config: FinetuneConfig) -> None:
    """Warn if the starting weights come from a pretraining of another length than the recipe is for."""
    init = Path(config.model.init)
    if not config.pretrained_epochs or not config.model.init:
        return
    run = init if init.is_dir() else init.parent
    try:
        values = json.loads((run / "config.json").read_bytes())
        kind, epochs = values["kind"], float(values["optim"]["epochs"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # not a run folder
    if kind != "mae" or epochs == config.pretrained_epochs:
        return
    alike = {name: p for name, p in FINETUNE_PRESETS.items() if p.model.name == config.model.name}
    lengths = sorted({preset.pretrained_epochs for preset in alike.values()} - {0})
    fitting = [name for name, preset in alike.items() if preset.pretrained_epochs == epochs]
    published = f"the paper gives numbers for {' and '.join(map(str, lengths))} epochs only"
    log(
        f"warning: {run} was pretrained for {epochs:g} epochs, and this recipe's numbers are for "
        f"{config.pretrained_epochs}; {f'use RECIPE={fitting[0]}' if fitting else published}"
    )


def freeze_trunk(model: nn.Module) -> None:
    """Train only the last norm and the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("norm.", "head.")))
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"frozen trunk: {learning:,} parameters learn, those of the last norm and the head")


def classifier_loss(
    config: FinetuneConfig, classes: int, model: nn.Module, batch: Batch, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of a batch, after mixup or cutmix if the configuration has them.

    reduction: "mean", or "none" for the cross-entropy of each row [b].
    """
    pixels, labels = batch.pixels, to_device(batch.labels, batch.pixels.device)
    keys = to_device(order.row_keys(config.run.seed, batch.epochs, batch.ids), pixels.device)
    smoothing = config.smoothing
    if config.mixup or config.cutmix:
        pixels, labels = mix(config, classes, pixels, labels, batch.positions)
        smoothing = 0.0  # the mixed labels are smoothed already
    logits = model(pixels, row_keys=keys).float()
    return functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)


@torch.no_grad()
def probabilities(
    config: FinetuneConfig, run: Run, model: NormalizedInput, dataset: Dataset, check: Check
) -> Iterator[Predictions]:
    """The predictions of each batch: the softmax averaged over a sample's views.

    check: called once per batch; an error that it raises ends the iteration.
    """
    views = config.views[0] * config.views[1]
    autocast = autocast_for(config.speed, run.world.device)
    model.eval()
    for batch in batches_of(config, run.world, dataset, config.views):
        check()
        with autocast():
            logits = model(batch.pixels)
        ids = to_device(batch.ids[::views].copy(), run.world.device)
        valid = to_device(batch.valid[::views].copy(), run.world.device)
        yield ids, valid, logits.float().softmax(-1).unflatten(0, (-1, views)).mean(1)


@torch.no_grad()
def evaluate(
    config: FinetuneConfig, run: Run, model: NormalizedInput, dataset: Dataset, check: Check
) -> dict[str, float]:
    """Top-1, top-5 and cross-entropy of the probabilities averaged over a sample's views.

    Top-5 is left out for five classes or fewer, because it is always 1. A sample whose probabilities are not
    all finite counts as wrong, and then `loss_val` is NaN. Rank 0 writes predictions.parquet to the run
    folder if there is one. Raises UserError when samples have no class or too many are damaged.
    """
    check_labels(dataset)
    top, device = min(KEPT, len(dataset.info.classes)), run.world.device
    labels = to_device(dataset.label.astype(np.int64), device)
    # A row per sample: its top classes, their probabilities, its loss, 1. Padding goes into the last row.
    table = torch.zeros(len(dataset) + 1, 2 * top + 2, device=device)
    for ids, valid, found in probabilities(config, run, model, dataset, check):
        chances, best = found.topk(top)
        finite = found.isfinite().all(1, keepdim=True)  # topk takes NaN for the largest
        losses = functional.nll_loss(found.clamp_min(1e-12).log(), labels[ids], reduction="none")
        rows = (best.where(finite, -1), chances, torch.stack([losses, torch.ones_like(losses)], 1))
        table[ids.where(valid, len(dataset))] = torch.cat(rows, 1)
    table = distributed.total(table[:-1]).cpu()  # each row is zero in all processes but one
    ids = table[:, -1].nonzero()[:, 0]  # not those of damaged samples
    check_damage(config.data, dataset, len(ids))
    best, chances, losses = table[ids, :top].int(), table[ids, top:-2], table[ids, -2]
    answers = labels.cpu()[ids]
    hits = (best == answers[:, None]).numpy()
    if run.world.is_main and run.folder is not None:
        write_predictions(run.folder, dataset, ids.numpy(), best.numpy(), chances.numpy())
    most = most_frequent(answers.numpy())
    if hits[:, 0].sum() <= most < len(ids):
        log(f"acc is not above {most / len(ids):.3g}, that of always predicting the most frequent class")
    sums = {"acc": hits[:, 0].sum(), "acc5": hits.sum(), "loss_val": losses.double().sum()}
    if len(dataset.info.classes) <= KEPT:
        del sums["acc5"]
    scores = {name: float(value) / max(1, len(ids)) for name, value in sums.items()}
    return scores | {"held_out": int(config.data.eval_split != "train")}


def write_predictions(
    folder: Path, dataset: Dataset, ids: np.ndarray, best: np.ndarray, chances: np.ndarray
) -> None:
    """Write predictions.parquet: id, source, class and most probable classes of samples ids [n].

    best: int32 [n, top], the most probable first, -1 without a prediction; chances: [n, top].
    """
    names = pa.array(dataset.info.classes, pa.string())

    def named(classes: np.ndarray) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(classes, pa.int32(), mask=classes < 0), names)

    labels = dataset.label[ids]
    source = read_batch(dataset.catalogue, ["source"])["source"].take(pa.array(ids))
    table = {"id": ids, "source": source, "label": labels, "class_name": named(labels)}
    for rank, (classes, chance) in enumerate(zip(best.T, chances.T, strict=True), start=1):
        table[f"class_{rank}"] = named(classes)
        table[f"probability_{rank}"] = pa.array(chance, pa.float32(), mask=classes < 0)
    with atomic_write(folder / "predictions.parquet") as temporary:
        pq.write_table(pa.table(table), temporary)


# ---- mixup and cutmix (arXiv 1710.09412, 1905.04899), drawn for all rows of a step's global batch
#
# In every group of 2 * repeats consecutive rows of the global batch, row k is mixed with row
# (k + repeats) % (2 * repeats), so that a sample is not mixed with its own copy. The two rows of a pair share
# one draw. Each process and micro batch uses the draws of its rows: their number does not change the result.


def mix(
    config: FinetuneConfig, classes: int, pixels: Tensor, labels: Tensor, positions: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Mix consecutive rows of one step: pixels uint8 [b, (T,) H, W, 3] and labels int64 [b], on one device.

    config: mixup and cutmix are not both 0. positions: int64 [b], see Batch; the first row is the first of a
    group, and b is a multiple of 2 * repeats.
    Returns float32 pixels, all frames of a clip mixed alike, and soft labels float32 [b, classes].
    """
    height, width = pixels.shape[-3:-1]
    repeats = config.data.repeats
    step, first = divmod(int(positions[0]), config.optim.batch)
    rows = first + np.arange(len(positions))
    drawn = draw_pairs(config, step, height, width)[pairs_of(rows, repeats)]
    columns = to_device(drawn, pixels.device)
    share = pixel_shares(columns, height, width)
    share = share.view(len(share), *[1] * (pixels.dim() - 4), height, width, 1)
    mixed = pixels.to(torch.float32, copy=True).lerp_(partners(pixels, repeats).float(), share)
    soft = soft_labels(labels, classes, config.smoothing)
    return mixed, torch.lerp(soft, partners(soft, repeats), columns[:, LABEL, None])


def draw_pairs(config: FinetuneConfig, step: int, height: int, width: int) -> NDArray[np.float32]:
    """The draws of all pairs of a step, float32 [batch / 2, 6]; they depend on (seed, step) alone.

    If mixup and cutmix are both on, each is applied with probability 1/2. Cutmix's box has the share
    1 - lambda of the area before the border clips it; the label follows the clipped area.
    """
    key = order.keys_of(config.run.seed, order.STREAM_MIX, step, np.arange(2))
    generator, pairs = np.random.Generator(np.random.Philox(key=key)), config.optim.batch // 2
    cuts = generator.random(pairs) < (0.5 if config.mixup else 1.0) * (config.cutmix > 0)
    alphas = np.where(cuts, config.cutmix, config.mixup)
    partner = 1 - generator.beta(alphas, alphas)
    edges = []
    for size in (height, width):
        center, length = generator.integers(0, size, pairs), (size * np.sqrt(partner)).astype(np.int64)
        edges += [np.clip(center - length // 2, 0, size), np.clip(center + (length + 1) // 2, 0, size)]
    top, bottom, left, right = (np.where(cuts, edge, 0) for edge in edges)
    area = (bottom - top) * (right - left) / (height * width)
    columns = (np.where(cuts, area, partner), np.where(cuts, 0, partner), top, bottom, left, right)
    return np.stack(columns, axis=1).astype(np.float32)


def pairs_of(rows: NDArray[np.int64], repeats: int) -> NDArray[np.int64]:
    """The pair that each row of the global batch belongs to."""
    return rows // (2 * repeats) * repeats + rows % repeats


def partners(x: Tensor, repeats: int) -> Tensor:
    """Each row's partner: x [b, ...] in another order."""
    return x.unflatten(0, (-1, 2, repeats)).flip(1).flatten(0, 2)


def pixel_shares(columns: Tensor, height: int, width: int) -> Tensor:
    """The partner's share of every pixel, float32 [b, H, W]: 1 inside the box."""
    y, x = (torch.arange(size, device=columns.device) for size in (height, width))
    rows = (y >= columns[:, TOP, None]) & (y < columns[:, BOTTOM, None])
    inside = rows[:, :, None] & ((x >= columns[:, LEFT, None]) & (x < columns[:, RIGHT, None]))[:, None]
    return torch.where(inside, 1.0, columns[:, OUTSIDE, None, None])


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot labels float32 [b, classes], of which the share `smoothing` is spread over all classes."""
    hit = labels[:, None] == torch.arange(classes, device=labels.device)
    return hit * (1 - smoothing) + smoothing / classes


def main() -> None:
    loop.main(parse(FINETUNE_PRESETS, "train.finetune", NOT_GIVEN), make_task)


if __name__ == "__main__":
    run_cli(main)
