"""The model card: what a run's weights are, what they were made from, and how to load them."""

import json
from collections.abc import Mapping
from pathlib import Path

from models import official
from models.inputs import IMAGE_STATS, VIDEO_STATS
from pipelines.dataset import DatasetInfo
from train.config import Config, MaeConfig, flatten, to_dict

MAIN = ("epochs", "batch", "lr", "lr_batch", "name", "weight_decay", "layer_decay", "ema", "clip_norm")
RELEASED = {f"{name.partition(':')[0]}.pth" for name in official.names()}


def card(config: Config, info: DatasetInfo, last_row: Mapping[str, object], steps: int) -> str:
    """The text of a model_card.md, in Markdown.

    info: of the packed dataset; last_row: the last metric row; steps: how many were taken.
    """
    data, model = config.data, config.model
    size = (data.size, data.size) if data.frames == 1 else (data.frames, data.size, data.size)
    heads, classes = (config.decoder_heads, 0) if isinstance(config, MaeConfig) else (0, len(info.classes))
    given = {"input_size": size, "abs_win": model.abs_win, "num_classes": classes, "decoder_heads": heads}
    settings = "".join(f", {key}={value!r}" for key, value in given.items() if value)
    mean, deviation = IMAGE_STATS if data.frames == 1 else VIDEO_STATS
    recipe = {f"optim.{name}": getattr(config.optim, name) for name in MAIN}
    recipe |= {key: value for key, value in flatten(to_dict(config)).items() if "." not in key}
    source = {"path": str(data.path), "splits": info.splits, "classes": info.classes}
    seen = ", of the TRAINING videos, nothing was held out" if last_row.get("held_out") == 0 else ""
    return f"""# {config.run.name}

{model.name}, {"a classifier" if classes else "a masked autoencoder"}, trained by hiera-train: {steps} steps.
Input: {info.kind}s of {" x ".join(map(str, size))} pixels, from 0 to 1, less {mean}, divided by {deviation}.

Data, its {len(info.classes)} classes in the order of the outputs; recipe; last metrics{seen}:
```json
{json.dumps(source, ensure_ascii=False)}
{json.dumps(recipe, ensure_ascii=False)}
{json.dumps({key: value for key, value in last_row.items() if value is not None})}
```
Licence: {_licence(model.init)}

Loading, from the folder of hiera-train's code:
```python
from models import create, load_weights
model = create({model.name!r}{settings})
load_weights(model, "model.safetensors")
# as timm's or transformers' file: python -m tools.convert model.safetensors other.safetensors --to timm
```
"""


def _licence(init: str) -> str:
    """What the starting weights demand of those made from them."""
    if not init:
        return "started from random weights; heed the terms of the data above."
    if official.is_name(init) or Path(init).name in RELEASED:
        return f"started from `{init}`, {official.LICENCE}; that holds for these weights too."
    return f"that of `{init}`, it started there: ask their authors, or see a model_card.md beside the file."
