"""Evaluation, exact over any number of processes: python -m train.evaluate RUN [--weights FILE] [--data DIR].

Every validation sample counts once, whatever the batch size and the number of processes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from torch.nn import functional

from models.inputs import NormalizedInput
from pipelines.augment import to_device
from pipelines.damage import damage_limit
from pipelines.dataset import Dataset
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write
from pipelines.loader import Batch, EvalLoader
from pipelines.order import keep_units
from pipelines.views import clip_notes
from train import distributed, ending, rundir, setup
from train.config import Config, FinetuneConfig, MaeConfig, from_dict
from train.distributed import World
from train.setup import Autocast


def batches_of(
    config: Config, world: World, catalogue: Dataset, views: tuple[int, int], samples: int = 0
) -> Iterator[Batch]:
    """This process's part of a split, in temporal x spatial `views`; `samples` a batch, 0: as configured."""
    fitting = max(1, (config.speed.eval_batch or config.speed.micro_batch) // (views[0] * views[1]))
    return iter(
        EvalLoader(catalogue, config.data, config.speed, world, samples=samples or fitting, views=views)
    )


def check_damage(config: Config, catalogue: Dataset, seen: int) -> None:
    """Raise UserError when `seen`, the samples that all processes evaluated, leaves out too many."""
    missing, limit = len(catalogue) - seen, damage_limit(catalogue, config.data.max_bad)
    if missing > limit:
        raise UserError(
            f"{missing} of the {len(catalogue)} samples in {catalogue.catalogue} are damaged, more than the "
            f"{limit} that data.max_bad allows; run `make verify DATA={catalogue.info.root}` and pack them "
            "again"
        )


@torch.no_grad()
def classifier_evaluation(
    config: FinetuneConfig,
    world: World,
    autocast: Autocast,
    folder: Path | None,
    model: NormalizedInput,
    catalogue: Dataset,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Top-1, top-5 and cross-entropy; the softmax of a sample's views is averaged first.

    check: called once a batch; what it raises ends the evaluation.
    Top-5 is left out for five classes or fewer, where it is always 1. A sample whose probabilities are not
    all finite counts as wrong, and `loss_val` is NaN then. The counts of every class go to
    `folder`/per_class.parquet if a folder is given. Raises UserError when too many samples are damaged.
    """
    views = config.views[0] * config.views[1]
    classes = catalogue.info.classes
    sums = torch.zeros(len(classes), 4, device=world.device, dtype=torch.float64)
    model.eval()
    for batch in batches_of(config, world, catalogue, config.views):
        check()
        with autocast():
            logits = model(batch.pixels)
        chances = logits.float().softmax(-1).unflatten(0, (-1, views)).mean(1)
        labels = to_device(batch.labels[::views], world.device)
        valid = to_device(batch.valid[::views].copy(), world.device)
        best = chances.topk(min(5, chances.shape[1])).indices == labels[:, None]
        best &= chances.isfinite().all(1, keepdim=True)  # topk takes NaN for the largest
        losses = functional.nll_loss(chances.clamp_min(1e-12).log(), labels, reduction="none")
        counts = torch.stack([best[:, 0], best.any(1), losses, valid], dim=1)
        counts = torch.where(valid[:, None], counts, 0.0)  # a product would keep the NaN of rows that pad
        sums.index_add_(0, labels, counts.double())
    top1, top5, loss, count = distributed.total(sums).cpu().T
    check_damage(config, catalogue, int(count.sum()))
    if world.is_main and folder is not None:
        table = {
            "class_name": classes,
            "samples": count.long().numpy(),
            "correct": top1.long().numpy(),
            "correct5": top5.long().numpy(),
            "accuracy": (top1 / count).numpy(),
        }
        with atomic_write(folder / "per_class.parquet") as temporary:
            pq.write_table(pa.table(table), temporary)
    every = max(1.0, count.sum().item())
    held_out = {"held_out": int(config.data.eval_split != "train")}
    named = zip(("acc", "acc5", "loss_val"), (top1, top5, loss), strict=True)
    scores = {name: part.sum().item() / every for name, part in named} | held_out
    return {name: value for name, value in scores.items() if name != "acc5" or len(classes) > 5}


@torch.no_grad()
def mae_evaluation(
    config: MaeConfig,
    world: World,
    autocast: Autocast,
    model: NormalizedInput,
    catalogue: Dataset,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Reconstruction loss with each sample's own fixed mask: comparable between steps and runs.

    NaN when the loss of any sample is. check: called once a batch; what it raises ends the evaluation.
    Raises UserError when too many samples are damaged.
    """
    units, kept = setup.check_masking(config, model.model)
    sums = torch.zeros(2, device=world.device, dtype=torch.float64)
    model.eval()
    for batch in batches_of(config, world, catalogue, (1, 1)):
        check()
        # In evaluation every epoch is -1, so a sample's mask never changes.
        keep = to_device(keep_units(0, batch.epochs, batch.ids, units, kept), world.device)
        with autocast():
            output = model(batch.pixels, keep=keep)
        losses = (output.pred.float() - output.label.float()).square().reshape(len(keep), -1).mean(1)
        valid = to_device(batch.valid, world.device)
        sums += torch.stack([torch.where(valid, losses, 0.0).sum(), valid.sum()])
    loss, count = distributed.total(sums).tolist()
    check_damage(config, catalogue, int(count))
    return {"loss_val": loss / max(1.0, count)}


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
    """A run's configuration, with other shards on demand. Raises UserError where there is none."""
    path = run / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run folder made by train.mae or train.finetune")
    config = from_dict(json.loads(path.read_text()))
    return replace(config, data=replace(config.data, path=data)) if data else config


def weights_of(run: Path, other: Path | None) -> Path:
    """A run's final weights, or the `other` ones asked for. Raises UserError where there are none."""
    weights = other or run / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} does not exist; let the run finish, or name a file: WEIGHTS= (--weights)")
    return weights


def load_model(
    config: Config, weights: Path, classes: Sequence[str], world: World, exactly: bool = True
) -> NormalizedInput:
    """The configured model with such weights, which must be its own where `exactly`, ready to evaluate."""
    config = replace(config, model=replace(config.model, init=str(weights)))
    model = setup.build_model(config, len(classes))
    report = setup.warm_start(model, config, whole=exactly, classes=classes)
    if world.is_main:
        print(report)
    return NormalizedInput(model, config.data.frames).to(world.device).eval()


def evaluate(arguments: Arguments) -> dict[str, float]:
    """Load the run's configuration and weights and evaluate them; raises UserError.

    Under torchrun the processes share the samples, and every one returns the same scores.
    """
    config = read_config(arguments.run, arguments.data)
    if arguments.views and isinstance(config, FinetuneConfig):
        config = replace(config, views=arguments.views)
    weights = weights_of(arguments.run, arguments.weights)
    world = distributed.start(arguments.device, config.speed.timeout)
    torch.set_num_threads(distributed.torch_threads(world))
    autocast, words = setup.precision(config, world)
    if world.is_main:
        print(words)
    catalogue = setup.open_validation(config)
    if catalogue is None:
        raise UserError(f"{config.data.path} has no validation samples")
    rundir.check_classes(arguments.run, catalogue.info)
    if world.is_main:
        print("".join(f"{note}\n" for note in clip_notes(catalogue, config.data)), end="")
    ready = load_model(config, weights, catalogue.info.classes, world)
    if isinstance(config, MaeConfig):
        return mae_evaluation(config, world, autocast, ready, catalogue)
    # The run's own record stays as it is when something else is evaluated.
    folder = None if arguments.weights or arguments.data or arguments.views else arguments.run
    return classifier_evaluation(config, world, autocast, folder, ready, catalogue)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m train.evaluate")
    scores = ending.end_together(lambda: evaluate(arguments))
    if distributed.rank() == 0:
        for name, value in scores.items():
            print(f"{name} {value:.6g}")


if __name__ == "__main__":
    run_cli(main)
