"""Pretraining and finetuning against training from scratch: python -m benchmarks.learning images --data DIR

For every seed, a small masked autoencoder is pretrained and finetuned, and the same classifier is trained
from scratch for the time of the finetuning. Images are also pretrained at other mask ratios and probed
during training. Clips are also evaluated in 5 x 3 views and with frames in another order. `playback` and
`letters` finetune the autoencoders of `clips` on other clips or labels: those of benchmarks/playback.py,
whose class is the order of their frames, and the letter that a speaker says. Each core runs one training at a
time. After an interruption, the same command continues.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write
from pipelines.machine import usable_cores
from train.config import FinetuneConfig
from train.evaluate import load_model, open_task, read_config
from train.metrics import HEALTH_COLUMNS, read_csv
from train.probe import Arguments as ProbeArguments
from train.probe import probe
from train.task import open_validation

Kind = Literal["images", "clips", "playback", "letters"]
RUNS = Path("runs/learning")


@dataclass(frozen=True)
class Recipe:
    """The three trainings that are compared; scratch has the learning rates that were best in trials."""

    pretrain: str  # empty: use the autoencoders of `clips`
    finetune: str
    scratch: str


RECIPES: dict[Kind, Recipe] = {
    "images": Recipe(
        "train.mae image-mae-pico --optim.epochs 64 --optim.warmup-epochs 6 --run.checkpoint-every 1050"
        " --run.eval-every 350 --speed.micro-batch 64 --speed.compile yes",
        "train.finetune image-ft-pico --optim.epochs 8 --optim.warmup-epochs 0.5 --run.eval-every 282"
        " --model.reuse-encoder-norm True",
        "train.finetune image-ft-pico --optim.epochs 8 --optim.warmup-epochs 0.5 --run.eval-every 282"
        " --optim.lr 3e-4 --optim.layer-decay 1",
    ),
    "clips": Recipe(
        "train.mae video-mae-pico --optim.epochs 40 --optim.warmup-epochs 4 --run.checkpoint-every 325"
        " --run.eval-every 325 --speed.micro-batch 16 --speed.compile yes",
        "train.finetune video-ft-pico --optim.epochs 4 --optim.warmup-epochs 0.5 --run.eval-every 65"
        " --model.reuse-encoder-norm True",
        "train.finetune video-ft-pico --optim.epochs 4 --optim.warmup-epochs 0.5 --run.eval-every 65"
        " --optim.lr 3e-4 --optim.layer-decay 1",
    ),
}
RECIPES["playback"] = Recipe(
    "",
    f"{RECIPES['clips'].finetune} --data.stride 1",
    f"{RECIPES['clips'].scratch} --data.stride 1",
)
LONGER = "--optim.epochs 16 --optim.warmup-epochs 2 --run.eval-every 130 --data.stride 1"
RECIPES["letters"] = Recipe(
    "", f"{RECIPES['clips'].finetune} {LONGER}", f"{RECIPES['clips'].scratch} {LONGER}"
)


@dataclass(frozen=True)
class Arguments:
    """Train and compare."""

    kind: tyro.conf.Positional[Kind]
    data: Path
    """packed dataset with labels and a validation split"""
    seeds: int = 3
    mask_ratios: tuple[float, ...] = (0.5, 0.75)
    """mask ratios for additional pretraining of images, with the first seed"""
    out: Path = Path("benchmarks/results/learning.json")
    """file for the results; it keeps the results of other kinds"""


def chains_of(arguments: Arguments) -> list[list[str]]:
    """Chains of commands, one list per core: pretraining, finetuning, training from scratch."""
    recipe, kind = RECIPES[arguments.kind], arguments.kind

    def command(text: str, name: str, seed: int, *more: object) -> str:
        place = f"--data.path {arguments.data} --run.root {RUNS} --run.name {kind}-{name}"
        rest = " ".join(map(str, more))
        return f"{text} {place} --run.seed {seed} --run.keep 100 {rest} --speed.device cpu"

    def pretrained(name: str, seed: int, *more: object) -> list[str]:
        before = [command(recipe.pretrain, f"mae-{name}", seed, *more)] if recipe.pretrain else []
        start = f"{kind if before else 'clips'}-mae-{name}"
        init = f"--model.init {RUNS}/{start}/model.safetensors"
        return [*before, command(recipe.finetune, f"ft-{name}", seed, init)]

    chains = [
        [*pretrained(str(seed), seed), command(recipe.scratch, f"scratch-{seed}", seed)]
        for seed in range(arguments.seeds)
    ]
    if kind == "images":
        chains += [
            [command(recipe.pretrain, f"mae-mask{ratio}", 0, "--mask-ratio", ratio)]
            for ratio in arguments.mask_ratios
        ]
    return chains


def run_all(chains: list[list[str]]) -> None:
    """Run the chains, one per core at a time. Raises UserError if a command fails."""
    free: SimpleQueue[int] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))[: usable_cores()]
    for core in cores:
        free.put(core)

    def run(chain: list[str]) -> None:
        core = free.get()
        try:
            for command in chain:
                run_on(core, command)
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(run, chains))


def run_on(core: int, command: str) -> None:
    """Run `python -m COMMAND` on one core, unless it is finished."""
    words = shlex.split(command)
    if (RUNS / words[words.index("--run.name") + 1] / "model_card.md").exists():
        return
    print(f"$ python -m {command}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL)
    os.sched_setaffinity(process.pid, {core})
    if process.wait():
        raise UserError(f"python -m {command} ended with exit code {process.returncode}; see above")


class Reordered(nn.Module):
    """A classifier of clips that sees the frames in another order: uint8 [b, T, H, W, 3] -> logits."""

    def __init__(self, inner: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.order = inner, torch.tensor(order)

    def forward(self, pixels: Tensor) -> object:
        return self.inner(pixels[:, self.order.to(pixels.device)])


ORDERS = {  # of the 16 frames: correct, one fixed wrong order, and only the middle frame
    "in order": list(range(16)),
    "shuffled": torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist(),
    "reversed": list(range(15, -1, -1)),
    "one frame": [8] * 16,
}


def accuracy(run: Path, views: tuple[int, int] = (1, 1), order: str = "in order") -> float:
    """Top-1 of a run's final weights, with the validation clips' frames in another order, or in views."""
    config = read_config(run)
    assert isinstance(config, FinetuneConfig)
    config = replace(config, views=views)
    catalogue = open_validation(config.data)
    assert catalogue is not None
    classes = catalogue.info.classes
    here, task = open_task(config, classes, "cpu")
    model: nn.Module = load_model(task.model, config, run / "model.safetensors", classes, here)
    if order != "in order":
        model = Reordered(model, ORDERS[order])
    return task.evaluate(model, catalogue, lambda: None)["acc"]  # pyrefly: ignore


# ---- results ----------------------------------------------------------------------------------------------


def last_accuracy(name: str) -> float:
    return read_csv(RUNS / name / "metrics.csv")[-1]["acc"]


def evaluated(name: str) -> list[dict]:
    """The metric rows of a run that have an evaluation."""
    return [row for row in read_csv(RUNS / name / "metrics.csv") if row["loss_val"] is not None]


def curve(name: str) -> list[tuple[int, float]]:
    """(step, validation loss) of a pretraining run."""
    return [(row["step"], row["loss_val"]) for row in evaluated(name)]


def health(name: str) -> dict[str, list[float]]:
    """The health columns of a pretraining run, and the steps of its evaluations."""
    rows = evaluated(name)
    return {column: [row[column] for row in rows] for column in ("step", *HEALTH_COLUMNS)}


def image_results(arguments: Arguments) -> dict[str, list[float]]:
    """Probes of the encoders: during pretraining, after each seed, and at other mask ratios."""
    run = RUNS / "images-mae-0"
    found = {}
    for weights in sorted((run / "checkpoints").glob("step-*.pt"))[:-1]:
        step = int(weights.stem.removeprefix("step-"))
        found |= probes(f"step {step}", [ProbeArguments(run, weights, device="cpu")])
    ends = [ProbeArguments(RUNS / f"images-mae-{seed}", device="cpu") for seed in range(arguments.seeds)]
    found |= probes("the last step", ends)
    for ratio in arguments.mask_ratios:
        last = ProbeArguments(RUNS / f"images-mae-mask{ratio}", device="cpu")
        found |= probes(f"the last step, mask ratio {ratio}", [last])
    return found


def probes(what: str, arguments: list[ProbeArguments]) -> dict[str, list[float]]:
    found = [probe(one) for one in arguments]
    return {f"{name} probe at {what}": [scores[name] for scores in found] for name in found[0]}


def clip_results(arguments: Arguments) -> dict[str, list[float]]:
    runs = [RUNS / f"{arguments.kind}-ft-{seed}" for seed in range(arguments.seeds)]
    views = {"5 x 3 views": (5, 3)} if arguments.kind == "clips" else {}
    found = {name: [accuracy(run, views=views[name]) for run in runs] for name in views}
    return found | {f"frames {order}": [accuracy(run, order=order) for run in runs] for order in ORDERS}


def results(arguments: Arguments) -> dict[str, list[float]]:
    """Validation accuracy or probe accuracy by name; one value per seed."""
    found = {
        title: [last_accuracy(f"{arguments.kind}-{name}-{seed}") for seed in range(arguments.seeds)]
        for title, name in (("pretrained + finetuned", "ft"), ("from scratch", "scratch"))
    }
    more = image_results if arguments.kind == "images" else clip_results
    return found | more(arguments)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.learning")
    chains = chains_of(arguments)
    run_all(chains)
    found = results(arguments)
    pretrained = range(arguments.seeds if RECIPES[arguments.kind].pretrain else 0)
    losses = {f"seed {seed}": curve(f"{arguments.kind}-mae-{seed}") for seed in pretrained}
    features = {f"seed {seed}": health(f"{arguments.kind}-mae-{seed}") for seed in pretrained}
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    commands = [f"python -m {command}" for chain in chains for command in chain]
    mine = {"accuracy": found, "mae_validation_loss": losses, "health": features, "commands": commands}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(json.dumps(before | {arguments.kind: mine}, indent=1))
    Console().print(table_of(arguments.kind, found))


def table_of(kind: Kind, found: dict[str, list[float]]) -> Table:
    """Percent by name: mean, deviation, and the value of each seed."""
    table = Table(kind, "mean", "standard deviation", "each")
    for name, values in found.items():
        spread = f"{100 * stdev(values):.1f}" if len(values) > 1 else "-"
        table.add_row(name, f"{100 * mean(values):.1f}", spread, " ".join(f"{100 * v:.1f}" for v in values))
    return table


if __name__ == "__main__":
    run_cli(main)
