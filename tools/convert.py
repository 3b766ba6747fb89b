"""Convert weights between implementations: `python -m tools.convert SRC DST --to timm`.

SRC is a file of any known format, or an official name such as `hiera_base_224:mae_in1k_ft_in1k`.
DST ends in .safetensors or .pth; for transformers it may be a folder, which gets a config.json too and
opens with `from_pretrained`.
"""

import json
from math import isqrt
from pathlib import Path
from typing import Literal

import tyro

from models.errors import ModelError
from models.factory import SIZES
from models.formats import State, from_ours, is_autoencoder, read_weights, stage_depths, to_ours
from models.official import path_of
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_write


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    to: Literal["upstream", "timm", "transformers", "ours"],
) -> None:
    """Convert weights to another implementation's names and file; raises UserError where it has none.

    Args:
        source: a weights file of any known format, or an official name.
        target: file to write, *.safetensors or *.pth, or for transformers a folder.
        to: whose names to write.
    """
    try:
        path = path_of(source)
        if target.exists() and path.exists() and target.samefile(path):
            raise UserError(f"{target} is the source itself; give another file to write")
        state = to_ours(read_weights(path))
        if "patch_embed.proj.weight" not in state:
            raise UserError(f"{source} holds no Hiera weights: there is no patch_embed.proj.weight")
        converted = from_ours(state, to)
    except ModelError as error:
        raise UserError(str(error)) from error
    if target.suffix in (".safetensors", ".pth"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(converted, target, to)
    elif to == "transformers":
        config = json.dumps(transformers_config(state, classes_beside(path)), indent=2) + "\n"
        target.mkdir(parents=True, exist_ok=True)
        _write(converted, target / "model.safetensors", to)
        (target / "config.json").write_text(config)
    else:
        raise UserError(f"{target} must end in .safetensors or .pth")
    left_out = len(state) - len(converted)
    why = f", {left_out} of the autoencoder's left out, since {to} has none" if left_out else ""
    print(f"wrote {target}: {len(converted)} tensors for {to}{why}")


def _write(state: State, path: Path, to: str) -> None:
    import torch
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            save_file({n: v.contiguous() for n, v in state.items()}, temporary, metadata={"format": "pt"})
        else:
            torch.save({"model_state": state} if to == "upstream" else state, temporary)


def classes_beside(weights: Path) -> list[str]:
    """The names that a run's data.json gives the classes of its weights; none for other files."""
    recorded = weights.with_name("data.json")
    return json.loads(recorded.read_text())["classes"] if recorded.is_file() else []


def transformers_config(state: State, names: list[str]) -> dict[str, object]:
    """The config.json that transformers needs beside weights in our names, with its classes' names if known.

    Heads cannot be read off weights: they come from the known size of that width.
    """
    width, depths = len(state["patch_embed.proj.bias"]), stage_depths(state)
    heads = {known: first for known, first, _ in SIZES.values()}.get(width)
    if heads is None:
        raise UserError(f"no known size has width {width}, so its heads are unknown; write a file")
    mae = is_autoencoder(state)
    side = 4 * isqrt(state["pos_embed"].shape[1])
    config: dict[str, object] = {
        "architectures": ["HieraForPreTraining" if mae else "HieraForImageClassification"],
        "model_type": "hiera",
        "embed_dim": width,
        "depths": depths,
        "num_heads": [heads << stage for stage in range(len(depths))],
        "image_size": [side, side],
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "num_query_pool": 2 if mae else 3,
    }
    if mae:
        blocks = {name.split(".")[1] for name in state if name.startswith("decoder_blocks.")}
        decoder = state["decoder_pos_embed"].shape[2]
        return config | {
            "decoder_hidden_size": decoder,
            "decoder_depth": len(blocks),
            "decoder_num_heads": max(1, decoder // 32),
        }
    classes = len(state["head.projection.bias"]) if "head.projection.bias" in state else 0
    labels = names if len(names) == classes else [f"LABEL_{i}" for i in range(classes)]
    numbers = {label: number for number, label in enumerate(labels)}
    return config | {"id2label": {i: label for label, i in numbers.items()}, "label2id": numbers}


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(convert, description=__doc__))
