"""Convert weights between implementations: `python -m tools.convert SRC DST --to timm`.

SRC is a file or folder of any known format, or an official name such as `hiera_base_224:mae_in1k_ft_in1k`.
DST ends in .safetensors or .pth. For transformers it may be a folder, which also gets config.json and
preprocessor_config.json, so that `from_pretrained` and `pipeline` open it.
"""

import json
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import tyro

from models.files import Weights, read_json, read_weights
from models.formats import State, from_ours, is_autoencoder, stage_depths, to_ours
from models.inputs import IMAGE_STATS
from models.zoo import CONFIGS, SIZES
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text, atomic_write

RELEASED_DATA = {"crop": 224 / 256, "interpolation": "cubic"}  # evaluation of the released models
RESAMPLE = {"linear": 2, "triangular": 2, "cubic": 3}  # Pillow's numbers; transformers always antialiases
USUAL_HEADS = {config.decoder_width: config.decoder_heads for config in CONFIGS.values()}


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    to: Literal["upstream", "timm", "transformers", "ours"],
) -> None:
    """Convert weights to the names and files of another implementation. Raises UserError.

    Args:
        source: a weights file of any known format, or an official name.
        target: file to write, *.safetensors or *.pth, or for transformers a folder.
        to: implementation whose names to write.
    """
    read = read_weights(source)
    state = to_ours(read.state)
    if "patch_embed.proj.weight" not in state:
        raise UserError(f"{source} holds no Hiera weights, such as patch_embed.proj.weight; give others")
    converted = from_ours(state, to)
    if target.exists() and (target.samefile(read.path) or target.samefile(read.path.parent)):
        raise UserError(f"{target} is the source itself; give another file or folder to write")
    notes = [read.note] if read.note else []
    if target.suffix in (".safetensors", ".pth"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(converted, target, to, read.decoder_heads)
    elif to == "transformers":
        notes += _write_folder(read, state, converted, target)
    else:
        raise UserError(f"the suffix of {target} is unknown; it must end in .safetensors or .pth")
    left_out = len(state) - len(converted)
    why = f"; {left_out} tensors of the autoencoder are left out: {to} has none" if left_out else ""
    print("\n".join([f"wrote {target}: {len(converted)} tensors for {to}{why}", *notes]))


def _write_folder(read: Weights, state: State, converted: State, folder: Path) -> list[str]:
    """Write a folder for transformers; return a line for every assumption."""
    notes = []
    heads = read.decoder_heads
    if is_autoencoder(state) and not heads:
        heads = USUAL_HEADS.get(state["decoder_pos_embed"].shape[2], 16)
        notes.append(
            f"decoder_num_heads {heads} is assumed: neither {read.path} nor its folder has it; "
            "if the model has another number, correct config.json"
        )
    config = transformers_config(state, read.classes, heads)
    data = read_json(read.path.with_name("config.json")).get("data")
    if not isinstance(data, dict) or not data.keys() >= RELEASED_DATA.keys():
        data = RELEASED_DATA
        notes.append(
            f"crop {data['crop']} and interpolation {data['interpolation']} are assumed, as for the "
            "released models; if the model is evaluated differently, correct preprocessor_config.json"
        )
    processor = preprocessor_config(_side(state), data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in {"config.json": config, "preprocessor_config.json": processor}.items():
        atomic_text(folder / name, json.dumps(values, indent=2) + "\n")
    _write(converted, folder / "model.safetensors", "transformers")
    return notes


def _write(state: State, path: Path, to: str, decoder_heads: int = 0) -> None:
    """Write weights. A safetensors file with our names also stores the decoder heads (0: unknown)."""
    import torch
    from safetensors.torch import save_file

    about = {"format": "pt"}  # transformers and timm require it
    if to in ("ours", "upstream") and decoder_heads:
        about = {"hiera-train": json.dumps({"decoder_heads": decoder_heads})}
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            save_file({n: v.contiguous() for n, v in state.items()}, temporary, metadata=about)
        else:
            torch.save({"model_state": state} if to == "upstream" else state, temporary)


def _side(state: State) -> int:
    """Side of the square input (pixels), from the weights of an image model."""
    return 4 * isqrt(state["pos_embed"].shape[1])


def preprocessor_config(side: int, data: Mapping[str, Any]) -> dict[str, object]:
    """The preprocessor_config.json with which transformers prepares pictures as our evaluation does.

    side: side of the model's input (pixels); data: the run's settings `crop` and `interpolation`.
    """
    mean, deviation = IMAGE_STATS
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / data["crop"])},
        "resample": RESAMPLE[data["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": deviation,
    }


def transformers_config(state: State, names: Sequence[str], decoder_heads: int) -> dict[str, object]:
    """The config.json that transformers needs for weights with our names; `names` are the classes, if known.

    Weights do not contain the number of heads. The encoder's follows from its width; the decoder's is given.
    """
    width, depths = len(state["patch_embed.proj.bias"]), stage_depths(state)
    heads = {known: first for known, first, _ in SIZES.values()}.get(width)
    if heads is None:
        raise UserError(
            f"no known size has width {width}, so its heads are unknown; write a file, not a folder"
        )
    mae = is_autoencoder(state)
    config: dict[str, object] = {
        "architectures": ["HieraForPreTraining" if mae else "HieraForImageClassification"],
        "model_type": "hiera",
        "embed_dim": width,
        "depths": depths,
        "num_heads": [heads << stage for stage in range(len(depths))],
        "image_size": [_side(state)] * 2,
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "num_query_pool": 2 if mae else 3,
    }
    if mae:
        blocks = {name.split(".")[1] for name in state if name.startswith("decoder_blocks.")}
        return config | {
            "decoder_hidden_size": state["decoder_pos_embed"].shape[2],
            "decoder_depth": len(blocks),
            "decoder_num_heads": decoder_heads,
        }
    classes = len(state["head.projection.bias"]) if "head.projection.bias" in state else 0
    labels = names if len(names) == classes else [f"LABEL_{i}" for i in range(classes)]
    numbers = {label: number for number, label in enumerate(labels)}
    return config | {"id2label": dict(enumerate(labels)), "label2id": numbers}


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(convert, description=__doc__))
