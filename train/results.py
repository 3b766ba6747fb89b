"""What a run leaves behind: the best and the final weights, a picture, the model card."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from pipelines.dataset import DatasetInfo
from pipelines.files import atomic_text, atomic_write
from train import rundir
from train.config import Config
from train.metrics import read_csv


def export(model: nn.Module, config: Config, name: str, step: int) -> Path:
    """Write the weights to `name` in the run folder, as safetensors that record model and step."""
    path = rundir.folder_of(config) / name
    weights = {key: tensor.contiguous().cpu() for key, tensor in model.state_dict().items()}
    # One entry: safetensors writes several in any order, and the file's checksum would mean nothing.
    facts = {"model": config.model.name, "step": step, "decoder_heads": getattr(config, "decoder_heads", 0)}
    about = {"hiera-train": json.dumps(facts)}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=about)
    return path


def write_card(config: Config, info: DatasetInfo, steps: int) -> None:
    """Write model_card.md from the configuration and the last metric row."""
    from train.card import card  # here: it needs the models, and a launcher does not

    run = rundir.folder_of(config)
    last_row = [{}, *read_csv(run / "metrics.csv")][-1]
    atomic_text(run / "model_card.md", card(config, info, last_row, steps))
