"""`python -m models.zoo` prints every model with its costs and published accuracy."""

import math

import torch
from rich.console import Console
from rich.table import Table

from models.factory import create, list_models
from models.macs import forward_macs
from models.unroll import UNIT

# top-1 of the finetuned classifiers: ImageNet-1K, Kinetics-400 with 15 views (arXiv 2306.00989)
PUBLISHED = {
    "tiny": (82.8, None),
    "small": (83.8, None),
    "base": (84.5, 84.0),
    "base_plus": (85.2, 85.0),
    "large": (86.1, 87.3),
    "huge": (86.9, 87.8),
}


def main() -> None:
    """Print the table of models."""
    table = Table(title="autoencoders' MACs at mask ratio 0.6 (images) and 0.9 (clips)")
    for column in ("model", "params (M)", "GMACs", "tokens", "mask units", "published top-1"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in list_models():
        with torch.device("meta"):
            model = create(name)
        config, mae = model.config, name.startswith("mae_")
        params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        macs = forward_macs(config, mae, mask_ratio=0.9 if config.video else 0.6) / 1e9
        size = name.split("hiera_")[1].rsplit("_", 1)[0]
        top1 = None if mae else PUBLISHED.get(size, (None, None))[config.video]
        units = "x".join(map(str, model.mask_units))
        tokens = math.prod(model.units) * UNIT * UNIT
        table.add_row(name, f"{params:.1f}", f"{macs:.1f}", str(tokens), units, f"{top1 or '-'}")
    Console(width=None if Console().is_terminal else 110).print(table)


if __name__ == "__main__":
    main()
