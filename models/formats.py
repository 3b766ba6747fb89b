"""State dicts of other implementations: wrappers around them, prefixes and parameter names.

Our names are those of the authors' release ("upstream"), whose .pth files have them under "model_state".
timm has the classifier, transformers the image classifier and the image autoencoder, birder all image models.
"sam2" is HieraDet, the trunk of SAM 2's image encoder: an encoder with absolute-window position embeddings.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines.errors import UserError

State = dict[str, Tensor]
Pairs = list[tuple[str, str]]  # prefixes, ours and theirs; the first match applies

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("model_state", "model_state_dict", "state_dict", "state", "model", "module")
NESTING = 4  # maximum depth of wrappers in wrappers


@dataclass(frozen=True)
class Names:
    """How the names of a format differ from ours."""

    prefixes: Pairs
    inside: Pairs  # parts of names; every one applies
    block: str = ""  # prefix of a block, if blocks are numbered within their stage
    first_stage: int = 0


FORMATS = {
    "upstream": Names([], []),
    "ours": Names([], []),
    "timm": Names([("head.projection.", "head.fc."), ("norm.", "head.norm.")], []),
    "transformers": Names(
        [
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
        ],
        [(".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after.")],
        "hiera.encoder.stages.{}.layers.{}.",
    ),
    "birder": Names(
        [("patch_embed.", "stem."), ("norm.", "features.1."), ("head.projection.", "classifier.")],
        [(".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.3.")],
        "body.stage{}.{}.",
        first_stage=1,
    ),
    "sam2": Names(
        [("pos_embed_win", "pos_embed_window")],
        [(".mlp.fc1.", ".mlp.layers.0."), (".mlp.fc2.", ".mlp.layers.1.")],
    ),
}
# The first layer in any format, after an optional prefix of wrappers such as `module.` or `model.`.
FIRST = re.compile(
    r"((?:[^.]+\.)*?)"
    r"(?:patch_embed\.proj|stem\.proj|(?:hiera\.)?embeddings\.patch_embeddings\.projection)\.weight"
)
COUNTER = "n_averaged"  # an entry that torch's AveragedModel adds
AUTOENCODER_ONLY = ("encoder_norm.", "mask_token", "decoder_", "multi_scale_fusion_heads.")


def unwrap(content: object, label: str) -> tuple[State, str]:
    """The state dict in a file's content, and a note if a moving average was chosen over the plain weights.

    timm also prefers the moving average, and so do this project's exports. Raises UserError.
    """
    found = _find_state(content, NESTING)
    if found is None:
        raise UserError(f"{label} has no state dict of names and tensors; save model.state_dict()")
    return found


def check_stored(state: State, path: Path) -> None:
    """Raise UserError for tensors that are larger than their file: expanded, sparse or without values."""
    for name, value in state.items():
        stored = value.layout == torch.strided and value.device.type == "cpu"
        if not stored or value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{path} does not store every value of {name}; save contiguous tensors")
    storages = (value.untyped_storage() for value in state.values())  # tensors may share one
    if sum({one.data_ptr(): one.nbytes() for one in storages}.values()) > path.stat().st_size:
        raise UserError(f"{path} does not store every value of its tensors; save them with torch.save")


def _find_state(content: object, depth: int) -> tuple[State, str] | None:
    if not isinstance(content, dict) or not content or not depth:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return content, ""
    inside = ((name, _find_state(content.get(name), depth - 1)) for name in (*AVERAGES, *WRAPPERS))
    found = {name: state for name, state in inside if state is not None}
    if not found:
        return None
    (first, (state, note)), *others = found.items()
    if first in AVERAGES and others:
        also = ", ".join(name for name, _ in others)
        note = f"{first} (the moving average) of the file was loaded; it also has {also}"
    return state, note


def is_autoencoder(state: State) -> bool:
    """Whether weights with our names are an autoencoder's."""
    return "decoder_pos_embed" in state


def is_video(state: State) -> bool:
    """Whether weights with our names are a clip model's."""
    return "pos_embed_temporal" in state


def format_of(state: State) -> str:
    """The format of the names, a key of FORMATS; "upstream" for ours."""
    marks = {
        "transformers": ("hiera.", "embeddings.", "encoder.stages."),
        "birder": ("stem.",),
        "sam2": ("pos_embed_window",),
        "timm": ("head.norm.", "head.fc."),
    }
    return next(
        (kind for kind, names in marks.items() if any(n.startswith(names) for n in state)), "upstream"
    )


def without_prefix(state: State) -> State:
    """Remove the prefix that DDP, torch.compile, Lightning or a backbone adds to names.

    Raises UserError if the state dict contains several models.
    """
    prefixes = {found[1] for name in state if (found := FIRST.fullmatch(name))}
    if len(prefixes) > 1:
        names = ", ".join(sorted(prefix or "no prefix" for prefix in prefixes))
        raise UserError(f"the weights hold {len(prefixes)} models ({names}); save one of them")
    prefix = next(iter(prefixes), "")
    bare = {name.removeprefix(prefix): value for name, value in state.items()}
    if len(bare) < len(state):
        raise UserError(f"the weights have names both with and without the prefix {prefix}; save one model")
    bare.pop(COUNTER, None)
    return bare


def to_ours(state: State) -> State:
    """Rename weights of any known format to our names; raises UserError if they are of several models."""
    state = without_prefix(state)
    kind = format_of(state)
    if any(name.startswith("embeddings.") for name in state):  # transformers' bare HieraModel
        state = {f"hiera.{name}": value for name, value in state.items()}
    names = FORMATS[kind]
    found = (re.match(names.block.replace("{}", r"(\d+)"), name) for name in state if names.block)
    places = sorted({(int(match[1]), int(match[2])) for match in found if match})
    back = [(theirs, ours) for ours, theirs in names.prefixes + _block_pairs(names, places)]
    inside = [(theirs, ours) for ours, theirs in names.inside]
    state = {_rename(name, back, inside): value for name, value in state.items()}
    if kind == "birder" and is_autoencoder(state):  # its pretraining does not train the classifier's norm
        state = {name: value for name, value in state.items() if not name.startswith("norm.")}
    return state


def from_ours(state: State, kind: str) -> State:
    """Rename weights with our names to a format of FORMATS; "upstream" and "ours" are the same.

    timm has no autoencoder: it gets the encoder, with encoder_norm as its final norm. sam2 gets the encoder.
    Raises UserError for models that the format does not have.
    """
    if kind == "timm" and is_autoencoder(state):
        norm = {f"norm.{part}": state[f"encoder_norm.{part}"] for part in ("weight", "bias")}
        state = {name: v for name, v in state.items() if not name.startswith(AUTOENCODER_ONLY)} | norm
    if kind == "transformers" and (is_video(state) or "pos_embed_win" in state):
        raise UserError(
            "transformers has Hiera for images with plain position embeddings only; choose another format"
        )
    if kind == "sam2":
        if "pos_embed_win" not in state:
            raise UserError(
                "SAM 2 has absolute-window position embeddings only; train with --model.abs-win True"
            )
        state = {n: v for n, v in state.items() if not n.startswith(("norm.", "head.", *AUTOENCODER_ONLY))}
    depths = stage_depths(state)
    wider = sum(f"blocks.{sum(depths[:stage])}.proj.weight" in state for stage in range(1, len(depths)))
    if kind not in ("ours", "timm") and ("blocks.0.ls1.gamma" in state or wider < len(depths) - 1):
        raise UserError(f"{kind} has no layer scale or pooled widening; choose --to timm")
    names = FORMATS[kind]
    places = [(names.first_stage + s, n) for s, depth in enumerate(depths) for n in range(depth)]
    pairs = names.prefixes + _block_pairs(names, places)
    return {_rename(name, pairs, names.inside): value for name, value in state.items()}


def stage_depths(state: State) -> list[int]:
    """Blocks per stage, from weights with our names: the first block of a stage widens the channels."""
    shapes = (state[f"blocks.{number}.attn.qkv.weight"].shape for number in range(_count_blocks(state)))
    starts = [number for number, (out, width) in enumerate(shapes) if not number or out > 3 * width]
    return [b - a for a, b in zip(starts, [*starts[1:], _count_blocks(state)], strict=True)]


def _count_blocks(state: State) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _block_pairs(names: Names, places: Iterable[tuple[int, int]]) -> Pairs:
    """Our prefix and theirs of every block, if they number blocks by (stage, number in the stage)."""
    if not names.block:
        return []
    return [(f"blocks.{number}.", names.block.format(*place)) for number, place in enumerate(places)]


def _rename(name: str, prefixes: Iterable[tuple[str, str]], inside: Iterable[tuple[str, str]]) -> str:
    """Replace the first matching prefix, and then every part in `inside`."""
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inside:
        name = name.replace(old, new)
    return name
