"""Write the tables of recipes into docs/which.md from the presets: python -m tools.recipes [--check]."""

import sys
from collections.abc import Mapping
from pathlib import Path

import tyro

from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text
from train.config import Config, FinetuneConfig, MaeConfig
from train.presets import FINETUNE_PRESETS, MAE_PRESETS, NOT_GIVEN

PAGE = Path(__file__).resolve().parent.parent / "docs/which.md"
BEGIN, END = "<!-- recipes: make them with python -m tools.recipes -->", "<!-- end of recipes -->"
SIZES = {"tiny": "T", "small": "S", "base": "B", "base_plus": "B+", "large": "L", "huge": "H"}
OWN = ("pico", "reference")  # ends of the names of presets without a column in the paper


def column_of(config: Config) -> str:
    """Table and column of the paper from which a preset is, such as "14b, L after 400".

    Raises UserError for a size that the paper does not have.
    """
    pretraining, video = isinstance(config, MaeConfig), config.data.frames > 1
    ssv2 = config.data.sampling == "segments"
    table = f"{'12' if ssv2 else '11' if video else '14'}{'a' if pretraining else 'b'}"
    name = config.model.name.removeprefix("mae_").removeprefix("hiera_").rpartition("_")[0]
    if name not in SIZES:
        raise UserError(f"the paper has no size {name}; add the name to OWN in tools/recipes.py")
    size = SIZES[name]
    if isinstance(config, FinetuneConfig):
        more = f", {config.data.frames} frames" if ssv2 else ""
        more = f" after {config.pretrained_epochs}" if config.pretrained_epochs else more
    else:
        more = f", {config.optim.epochs:g}" if video and size == "H" else ""
    return f"{table}, {size}{more}"


def pretraining_cells(config: MaeConfig) -> dict[str, str]:
    data, optim = config.data, config.optim
    return {
        "lr at batch": f"{optim.lr:g} at {optim.batch}",
        "epochs, warmup": f"{optim.epochs:g}, {optim.warmup_epochs:g}",
        "drop path": f"{config.model.drop_path:g}",
        "mask": f"{config.mask_ratio:g}",
        "crop area": f"{data.scale[0]:g} to {data.scale[1]:g}{'' if data.flip else ', no flip'}",
        "repeats": str(data.repeats),
        "gradient clip": f"{optim.clip_norm:g}" if optim.clip_norm else "none",
    }


def finetuning_cells(config: FinetuneConfig) -> dict[str, str]:
    data, optim, augment = config.data, config.optim, config.data.augment
    return {
        "lr at batch": f"{'' if optim.name == 'adamw' else 'SGD, '}{optim.lr:g} at {optim.batch}",
        "epochs, warmup": f"{optim.epochs:g}, {optim.warmup_epochs:g}",
        "layer decay": f"{optim.layer_decay:g}",
        "drop path, dropout": f"{config.model.drop_path:g}, {config.model.dropout:g}",
        "RandAugment": f"{augment.layers} x ({augment.magnitude:g}, {augment.magnitude_std:g})",
        "crop area": f"{data.scale[0]:g} to {data.scale[1]:g}{'' if data.flip else ', no flip'}",
        "mixup, cutmix, smoothing": f"{config.mixup:g}, {config.cutmix:g}, {config.smoothing:g}",
        "views": f"{config.views[0]} x {config.views[1]}",
    }


def section() -> str:
    """The Markdown between the markers."""
    mae = {name: (config, pretraining_cells(config)) for name, config in MAE_PRESETS.items()}
    finetune = {name: (config, finetuning_cells(config)) for name, config in FINETUNE_PRESETS.items()}
    missing = [f"- `{name}` does not exist: {why}." for name, why in NOT_GIVEN.items()]
    return "\n".join([BEGIN, "", *table(mae), "", *table(finetune), "", *missing, "", END])


def table(rows: Mapping[str, tuple[Config, dict[str, str]]]) -> list[str]:
    """Lines of a Markdown table; equal presets share a row."""
    columns: list[str] = []
    names: dict[str, list[str]] = {}
    for name, (config, cells) in rows.items():
        columns = ["preset", "paper's table", "input", *cells]
        column = "none" if name.endswith(OWN) else column_of(config)
        size = f"{config.data.size} x {config.data.size}"
        shape = size if config.data.frames == 1 else f"{config.data.frames} x {size}"
        names.setdefault(" | ".join([column, shape, *cells.values()]), []).append(f"`{name}`")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {', '.join(alike)} | {cells} |" for cells, alike in names.items()]


def main(check: bool = False) -> None:
    """Rewrite the table in docs/which.md.

    Args:
        check: only check; fail if the page is out of date.
    """
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise UserError(f"{PAGE} has no markers for the table; restore the lines {BEGIN} and {END}")
    now = before + section() + after
    if check and now != text:
        raise UserError(f"{PAGE} is out of date; run python -m tools.recipes")
    if not check:
        atomic_text(PAGE, now)


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(main)))
