"""Supervised finetuning: python -m train.finetune PRESET [--overrides].

python -m train.finetune image-ft-base --model.init runs/image-mae-base/model.safetensors --speed.processes 4
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.inputs import NormalizedInput
from pipelines.augment import to_device
from pipelines.dataset import Dataset
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write
from pipelines.loader import Batch
from pipelines.order import row_keys
from train import distributed, loop
from train.build import autocast_for
from train.config import FinetuneConfig
from train.console import log, parse
from train.metrics import FINETUNE_COLUMNS
from train.mixing import mix
from train.presets import FINETUNE_PRESETS, NOT_GIVEN
from train.rundir import Run
from train.task import Check, Predictions, Task, batches_of, check_damage, create_classifier, open_splits


def make_task(config: FinetuneConfig, run: Run) -> Task:
    """Finetuning on the configured data; raises UserError unless every training sample has a class."""
    from models.zoo import forward_macs

    train, validation = open_splits(config, run)
    check_labels(train)
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
        evaluate=partial(evaluate, config, run),
        columns=FINETUNE_COLUMNS,
        loss_column="loss",
        mixed=2 if config.mixup or config.cutmix else 1,
        probabilities=partial(probabilities, config, run),
    )


def check_labels(train: Dataset) -> None:
    """Raise UserError unless every training sample has a class, of two or more."""
    if len(train.info.classes) == 1:
        raise UserError(f"{train.info.root} has one class only; there is nothing to tell apart")
    if (train.label < 0).any():
        raise UserError(f"{train.info.root} has samples without a class; finetuning needs labelled shards")


def warn_of_length(config: FinetuneConfig) -> None:
    """Warn if the starting weights come from a pretraining of another length than the recipe is for."""
    init = Path(config.model.init)
    if not config.pretrained_epochs or not config.model.init:
        return
    run = init if init.is_dir() else init.parent
    try:
        values = json.loads((run / "config.json").read_text())
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


def classifier_loss(config: FinetuneConfig, classes: int, model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch, after mixup or cutmix if the configuration has them."""
    pixels, labels = batch.pixels, to_device(batch.labels, batch.pixels.device)
    keys = to_device(row_keys(config.run.seed, batch.epochs, batch.ids), pixels.device)
    smoothing = config.smoothing
    if config.mixup or config.cutmix:
        pixels, labels = mix(config, classes, pixels, labels, batch.positions)
        smoothing = 0.0  # the mixed labels are smoothed already
    return functional.cross_entropy(model(pixels, row_keys=keys).float(), labels, label_smoothing=smoothing)


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
        labels = to_device(batch.labels[::views], run.world.device)
        valid = to_device(batch.valid[::views].copy(), run.world.device)
        yield labels, valid, logits.float().softmax(-1).unflatten(0, (-1, views)).mean(1)


@torch.no_grad()
def evaluate(
    config: FinetuneConfig, run: Run, model: NormalizedInput, dataset: Dataset, check: Check
) -> dict[str, float]:
    """Top-1, top-5 and cross-entropy of the probabilities averaged over a sample's views.

    Top-5 is left out for five classes or fewer, because it is always 1. A sample whose probabilities are not
    all finite counts as wrong, and then `loss_val` is NaN. The counts of every class are written to
    per_class.parquet in the run folder if there is one. Raises UserError when too many samples are damaged.
    """
    sums = torch.zeros(len(dataset.info.classes), 4, device=run.world.device, dtype=torch.float64)
    for labels, valid, found in probabilities(config, run, model, dataset, check):
        best = found.topk(min(5, found.shape[1])).indices == labels[:, None]
        best &= found.isfinite().all(1, keepdim=True)  # topk takes NaN for the largest
        losses = functional.nll_loss(found.clamp_min(1e-12).log(), labels, reduction="none")
        counts = torch.stack([best[:, 0], best.any(1), losses, valid], dim=1)
        counts = torch.where(valid[:, None], counts, 0.0)  # a product would keep the NaN of rows that pad
        sums.index_add_(0, labels, counts.double())
    top1, top5, loss, count = distributed.total(sums).cpu().T
    check_damage(config.data, dataset, int(count.sum()))
    if run.world.is_main and run.folder is not None:
        table = {
            "class_name": dataset.info.classes,
            "samples": count.long().numpy(),
            "correct": top1.long().numpy(),
            "correct5": top5.long().numpy(),
            "accuracy": (top1 / count).numpy(),
        }
        with atomic_write(run.folder / "per_class.parquet") as temporary:
            pq.write_table(pa.table(table), temporary)
    named = {"acc": top1, "acc5": top5, "loss_val": loss}
    if len(dataset.info.classes) <= 5:
        del named["acc5"]
    scores = {name: part.sum().item() / max(1.0, count.sum().item()) for name, part in named.items()}
    return scores | {"held_out": int(config.data.eval_split != "train")}


def main() -> None:
    loop.main(parse(FINETUNE_PRESETS, "train.finetune", NOT_GIVEN), make_task)


if __name__ == "__main__":
    run_cli(main)
