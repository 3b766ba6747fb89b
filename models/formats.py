"""Weights files and the parameter names of other implementations; files are never unpickled as code.

Our names are those of the authors' release ("upstream"), which wraps them in a .pth under "model_state".
timm has the classifier, transformers the image classifier and the image autoencoder.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from models.errors import ModelError

State = dict[str, Tensor]
Pairs = list[tuple[str, str]]  # prefixes, ours and theirs; the first that fits counts

TIMM: Pairs = [("head.projection.", "head.fc."), ("norm.", "head.norm.")]
TRANSFORMERS: Pairs = [
    ("head.projection.", "classifier."),
    ("norm.", "hiera.pooler.layernorm."),
    ("patch_embed.proj.", "hiera.embeddings.patch_embeddings.projection."),
    ("pos_embed", "hiera.embeddings.position_embeddings"),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_position_embeddings"),
    ("decoder_embed.", "decoder.decoder_embeddings."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
    ("decoder_blocks.", "decoder.decoder_block.layers."),
    ("multi_scale_fusion_heads.", "multiscale_fusion.multi_scale_fusion_heads."),
]
IN_BLOCKS = ((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."))  # transformers
AUTOENCODER_ONLY = ("encoder_norm.", "mask_token", "decoder_", "multi_scale_fusion_heads.")


def read_weights(path: Path) -> State:
    """Read a safetensors or PyTorch file, or a folder's model.safetensors, into a flat dict on the CPU.

    Raises ModelError when there is no file, or one that holds anything but tensors.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")
    try:
        content = _read(path)
    except Exception as error:  # torch, zip, pickle and safetensors each have their own
        what = type(error).__name__
        raise ModelError(
            f"{path} is no weights file of tensors alone, in PyTorch or safetensors ({what})"
        ) from error
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path} holds no state dict of names and tensors")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): v for name, v in content.items()}


def _read(path: Path) -> State:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def is_autoencoder(state: State) -> bool:
    """Whether weights in our names are an autoencoder's."""
    return "decoder_pos_embed" in state


def is_video(state: State) -> bool:
    """Whether weights in our names are a clip model's."""
    return "pos_embed_temporal" in state


def format_of(state: State) -> str:
    """Tell whose names these are: "upstream" (and ours), "timm" or "transformers"."""
    if any(name.startswith(("hiera.", "embeddings.", "encoder.stages.")) for name in state):
        return "transformers"
    return "timm" if any(name.startswith(("head.norm.", "head.fc.")) for name in state) else "upstream"


def to_ours(state: State) -> State:
    """Rename weights of any known format to our names."""
    kind = format_of(state)
    if any(name.startswith("embeddings.") for name in state):  # transformers' bare HieraModel
        state = {f"hiera.{name}": value for name, value in state.items()}
    places = {tuple(name.split(".")[3:6:2]) for name in state if name.startswith("hiera.encoder.stages.")}
    stages = Counter(int(stage) for stage, _ in places)
    back = [(theirs, ours) for ours, theirs in _pairs(kind, [stages[s] for s in sorted(stages)])]
    inside = [(theirs, ours) for ours, theirs in IN_BLOCKS] if kind == "transformers" else []
    return {_rename(name, back, inside): value for name, value in state.items()}


def from_ours(state: State, kind: str) -> State:
    """Rename weights in our names to "timm" or "transformers"; "upstream" and "ours" are the same.

    timm has no decoder: of an autoencoder it gets the encoder, encoder_norm as its final norm.
    Raises ModelError for models that transformers does not have: of clips, or with abs_win positions.
    """
    if kind == "timm" and is_autoencoder(state):
        norm = {f"norm.{part}": state[f"encoder_norm.{part}"] for part in ("weight", "bias")}
        state = {name: v for name, v in state.items() if not name.startswith(AUTOENCODER_ONLY)} | norm
    if kind == "transformers" and (is_video(state) or "pos_embed_win" in state):
        raise ModelError("transformers has Hiera for images with plain position embeddings only")
    pairs, inside = _pairs(kind, stage_depths(state)), IN_BLOCKS if kind == "transformers" else ()
    return {_rename(name, pairs, inside): value for name, value in state.items()}


def stage_depths(state: State) -> list[int]:
    """Blocks per stage, from weights in our names: a block with its own `proj` opens a stage."""
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    starts = sorted({0} | {n for n in numbers if f"blocks.{n}.proj.weight" in state})
    return [b - a for a, b in zip(starts, [*starts[1:], len(numbers)], strict=True)]


def _pairs(kind: str, depths: list[int]) -> Pairs:
    """The prefixes that differ; transformers counts blocks within their stage."""
    if kind != "transformers":
        return TIMM if kind == "timm" else []
    places = [f"hiera.encoder.stages.{s}.layers.{n}." for s, depth in enumerate(depths) for n in range(depth)]
    return TRANSFORMERS + [(f"blocks.{number}.", place) for number, place in enumerate(places)]


def _rename(name: str, prefixes: Iterable[tuple[str, str]], inside: Iterable[tuple[str, str]]) -> str:
    """Swap the first prefix that fits, and then every part `inside`."""
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inside:
        name = name.replace(old, new)
    return name
