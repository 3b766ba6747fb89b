"""The results of a run: its weights, and the model card that says what they are and how to load them."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from models.files import LICENSE, is_official, official_names
from models.layers import IMAGE_STATS, VIDEO_STATS
from pipelines.dataset import DatasetInfo
from pipelines.files import atomic_text, atomic_write
from train.config import Config, flatten, to_dict
from train.metrics import read_csv

MAIN = ("epochs", "batch", "lr", "lr_batch", "name", "weight_decay", "layer_decay", "ema", "clip_norm")
RELEASED = {f"{name.partition(':')[0]}.pth" for name in official_names()}


def export(model: nn.Module, config: Config, name: str, step: int) -> Path:
    """Write the weights to `name` in the run folder, as safetensors that record model and step."""
    path = config.run.folder / name
    weights = {key: tensor.contiguous().cpu() for key, tensor in model.state_dict().items()}
    # One entry: safetensors writes several in any order, and the same weights must give the same bytes.
    facts = {"model": config.model.name, "step": step, "decoder_heads": getattr(config, "decoder_heads", 0)}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"hiera-train": json.dumps(facts)})
    return path


def write_card(config: Config, info: DatasetInfo, steps: int) -> None:
    """Write model_card.md from the configuration and the last metric row."""
    last_row = [{}, *read_csv(config.run.folder / "metrics.csv")][-1]
    atomic_text(config.run.folder / "model_card.md", model_card(config, info, last_row, steps))


def model_card(config: Config, info: DatasetInfo, last_row: Mapping[str, object], steps: int) -> str:
    """The text of a model_card.md, in Markdown.

    info: of the packed dataset; last_row: the last metric row; steps: how many were trained.
    """
    data, model = config.data, config.model
    size = (data.size, data.size) if data.frames == 1 else (data.frames, data.size, data.size)
    autoencoder = model.name.startswith("mae_")
    kind = "a masked autoencoder" if autoencoder else "a classifier"
    heads, classes = getattr(config, "decoder_heads", 0), 0 if autoencoder else len(info.classes)
    arguments = {"input_size": size, "abs_win": model.abs_win, "num_classes": classes, "decoder_heads": heads}
    settings = "".join(f", {key}={value!r}" for key, value in arguments.items() if value)
    settings += "" if getattr(config, "normalize_targets", True) else ", normalize_targets=False"
    mean, deviation = IMAGE_STATS if data.frames == 1 else VIDEO_STATS
    recipe = {f"optim.{name}": getattr(config.optim, name) for name in MAIN}
    recipe |= {key: value for key, value in flatten(to_dict(config)).items() if "." not in key}
    source = {"path": str(data.path), "splits": info.splits, "classes": info.classes}
    other = "other.safetensors --to timm" if data.frames == 1 or autoencoder else "other.onnx --to onnx"
    outputs = "" if autoencoder else f", its {len(info.classes)} classes in the order of the outputs"
    seen = " (on the training samples; nothing was held out)" if last_row.get("held_out") == 0 else ""
    return f"""# {config.run.name}

{model.name}, {kind}, trained by hiera-train: {steps} steps.
Input: {info.kind}s of {" x ".join(map(str, size))} pixels, from 0 to 1, minus {mean}, divided by {deviation}.

Data{outputs}; recipe; last metrics{seen}:
```json
{json.dumps(source, ensure_ascii=False)}
{json.dumps(recipe, ensure_ascii=False)}
{json.dumps({key: value for key, value in last_row.items() if value is not None})}
```
License: {_licence(model.init)}

Loading, from the folder of hiera-train's code, with the path of model.safetensors:
```python
from models import create, load_weights
model = create({model.name!r}{settings})
load_weights(model, "model.safetensors")
# for other programs: python -m tools.convert model.safetensors {other}
```
"""


def _licence(init: str) -> str:
    """The license of weights that started from `init`."""
    if not init:
        return "started from random weights; the terms of the data above apply."
    if is_official(init) or Path(init).name in RELEASED:
        return f"started from `{init}`, {LICENSE}, which applies to these weights too."
    return f"that of the starting weights `{init}`: ask their authors, or see a model_card.md next to them."
