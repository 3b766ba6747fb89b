"""State dicts of other implementations: wrappers around them, prefixes and parameter names.

Our names are those of the authors' release ("upstream"), whose .pth files have them under "model_state".
timm has the classifier, transformers the image classifier and the image autoencoder.
"""

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from pipelines.errors import UserError

State = dict[str, Tensor]
Pairs = list[tuple[str, str]]  # prefixes, ours and theirs; the first match applies

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("model_state", "model_state_dict", "state_dict", "model", "module")
NESTING = 4  # maximum depth of wrappers in wrappers

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
# The first layer in any format, after an optional prefix of wrappers such as `module.` or `model.`.
FIRST = re.compile(
    r"((?:[^.]+\.)*?)(?:patch_embed\.proj|(?:hiera\.)?embeddings\.patch_embeddings\.projection)\.weight"
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
    """The format of the names: "upstream" (and ours), "timm" or "transformers"."""
    if any(name.startswith(("hiera.", "embeddings.", "encoder.stages.")) for name in state):
        return "transformers"
    return "timm" if any(name.startswith(("head.norm.", "head.fc.")) for name in state) else "upstream"


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
    places = {tuple(name.split(".")[3:6:2]) for name in state if name.startswith("hiera.encoder.stages.")}
    stages = Counter(int(stage) for stage, _ in places)
    back = [(theirs, ours) for ours, theirs in _pairs(kind, [stages[s] for s in sorted(stages)])]
    inside = [(theirs, ours) for ours, theirs in IN_BLOCKS] if kind == "transformers" else []
    return {_rename(name, back, inside): value for name, value in state.items()}


def from_ours(state: State, kind: str) -> State:
    """Rename weights with our names to "timm" or "transformers"; "upstream" and "ours" are the same.

    timm has no autoencoder: it gets the encoder, with encoder_norm as its final norm.
    Raises UserError for models that transformers does not have: clip models, and those with abs_win.
    """
    if kind == "timm" and is_autoencoder(state):
        norm = {f"norm.{part}": state[f"encoder_norm.{part}"] for part in ("weight", "bias")}
        state = {name: v for name, v in state.items() if not name.startswith(AUTOENCODER_ONLY)} | norm
    if kind == "transformers" and (is_video(state) or "pos_embed_win" in state):
        raise UserError(
            "transformers has Hiera for images with plain position embeddings only; choose another format"
        )
    pairs, inside = _pairs(kind, stage_depths(state)), IN_BLOCKS if kind == "transformers" else ()
    return {_rename(name, pairs, inside): value for name, value in state.items()}


def stage_depths(state: State) -> list[int]:
    """Blocks per stage, from weights with our names: the first block of a stage has a `proj`."""
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    starts = sorted({0} | {n for n in numbers if f"blocks.{n}.proj.weight" in state})
    return [b - a for a, b in zip(starts, [*starts[1:], len(numbers)], strict=True)]


def _pairs(kind: str, depths: list[int]) -> Pairs:
    """The prefixes that differ; transformers numbers blocks within their stage."""
    if kind != "transformers":
        return TIMM if kind == "timm" else []
    places = [f"hiera.encoder.stages.{s}.layers.{n}." for s, depth in enumerate(depths) for n in range(depth)]
    return TRANSFORMERS + [(f"blocks.{number}.", place) for number, place in enumerate(places)]


def _rename(name: str, prefixes: Iterable[tuple[str, str]], inside: Iterable[tuple[str, str]]) -> str:
    """Replace the first matching prefix, and then every part in `inside`."""
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inside:
        name = name.replace(old, new)
    return name
