"""Load weights of any known format into a model, adapt them to its input, and report every tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.files import Weights, read_weights
from models.formats import AUTOENCODER_ONLY, State, is_autoencoder, is_video, to_ours, unwrap
from models.hiera import Encoder
from models.mae import MaskedAutoencoder
from models.unroll import UNIT, Grid
from pipelines.errors import UserError


@dataclass(frozen=True)
class LoadReport:
    """The names of all tensors, by what was done with them."""

    source: str
    loaded: tuple[str, ...]  # unchanged
    resampled: tuple[str, ...]  # position embeddings resampled to another grid
    inflated: tuple[str, ...]  # image weights expanded for a clip model
    fresh: tuple[str, ...]  # only in the model: they keep their initial values
    unused: tuple[str, ...]  # only in the source
    notes: tuple[str, ...] = ()  # further facts, a clause each

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("resampled", "inflated", "fresh", "unused"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what} ({summary(names)})")
        return "; ".join([f"{self.source}: " + ", ".join(parts), *self.notes])


def summary(names: tuple[str, ...]) -> str:
    """Parameter names shortened to their modules, such as `decoder_blocks.*, norm.*`."""
    return ", ".join(dict.fromkeys(f"{n.split('.')[0]}.*" if "." in n else n for n in names))


def load_weights(
    model: nn.Module,
    source: str | Path | State,
    *,
    reuse_encoder_norm: bool = False,
    classes: Sequence[str] = (),
    quiet: bool = False,
) -> LoadReport:
    """Load weights into `model`, and print a report unless `quiet`.

    source: a file, folder or state dict of upstream, timm, transformers or ours, or an official name such as
    `mae_hiera_base_16x224:mae_k400` (see files.py).
    classes: the class names of the model's outputs, if known; the report compares them with the source's.
    reuse_encoder_norm: a classifier's final norm starts from the autoencoder's `encoder_norm`, as in timm.

    - From autoencoder weights, a classifier loads the encoder. Its final norm and head keep their initial
      values, as in the authors' code.
    - A head for another number of classes is not loaded.
    - Position embeddings are resampled to the model's input size.
    - Image weights are inflated for a clip model.

    Raises UserError for any other difference, for values that are not finite, and for a decoder with another
    number of heads.
    """
    if not isinstance(model, Encoder):
        raise UserError(f"load_weights got a {type(model).__name__}; give it a model of models.create")
    read = _read(source)
    label = str(read.path if isinstance(source, dict) or Path(source).is_dir() else source)
    state = to_ours(read.state)
    _check_decoder(label, state, read.decoder_heads, model)
    state, inflated = inflate(state, model)
    state, resampled = resample_positions(state, model)
    own = model.state_dict()
    state, optional = _match_heads(state, own, reuse_encoder_norm)
    fits = {n: v for n, v in state.items() if _shape(own, n) == v.shape}
    fresh, unused = (tuple(n for n in names if n not in fits) for names in (own, state))
    _refuse(label, own, state, [n for n in (*fresh, *unused) if not n.startswith(optional)])
    _check_finite(label, fits)
    model.load_state_dict(fits, strict=False)
    inflated = tuple(n for n in inflated if n in fits and n not in resampled)
    loaded = tuple(n for n in fits if n not in (*resampled, *inflated))
    notes = tuple(note for note in (read.note, _head_note(fits, read.classes, classes)) if note)
    report = LoadReport(label, loaded, tuple(resampled), inflated, fresh, unused, notes)
    if not quiet:
        print(report)
    return report


def _read(source: str | Path | State) -> Weights:
    """Read weights by path or official name, or unwrap a state dict."""
    if not isinstance(source, dict):
        return read_weights(source)
    state, note = unwrap(source, "weights")
    return Weights(Path("weights"), state, note)


def _check_decoder(label: str, state: State, heads: int, model: Encoder) -> None:
    """Raise UserError if the decoder has another number of heads, which its shapes do not show."""
    if not isinstance(model, MaskedAutoencoder) or not is_autoencoder(state):
        return
    if heads and heads != model.config.decoder_heads:
        raise UserError(
            f"{label}: the decoder has {heads} heads in the weights and {model.config.decoder_heads} in the "
            f"model; create the model with decoder_heads {heads} (--decoder-heads {heads})"
        )


def _check_finite(label: str, state: State) -> None:
    """Raise UserError if a tensor contains NaN or infinity."""
    for name, value in state.items():
        if not value.float().isfinite().all():
            raise UserError(
                f"{label} has values that are not finite (NaN or infinity), first in {name}; "
                "use weights from before the training diverged, such as an earlier checkpoint"
            )


def _head_note(loaded: State, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """A note if a classifier's head was loaded, unless its classes are known to be the same."""
    if "head.projection.weight" not in loaded:
        return ""
    count = len(loaded["head.projection.weight"])
    reused = f"the head of {count} classes is reused"
    if not len(theirs) == len(ours) == count:
        return f"{reused}; its classes are assumed to be the same"
    for number, (there, here) in enumerate(zip(theirs, ours, strict=True)):
        if there != here:
            return f"{reused}, but class {number} is {there!r} in the weights, not {here!r}"
    return ""


def _match_heads(state: State, own: State, reuse_encoder_norm: bool) -> tuple[State, tuple[str, ...]]:
    """The weights for this model's norm and head, and prefixes of tensors that may be missing or extra."""
    if is_autoencoder(state) and not is_autoencoder(own):
        if reuse_encoder_norm:
            state |= {f"norm.{part}": state.pop(f"encoder_norm.{part}") for part in ("weight", "bias")}
        return state, ("norm.", "head.", *AUTOENCODER_ONLY)
    if _shape(state, "head.projection.weight") != _shape(own, "head.projection.weight"):
        trunk_only = not state.keys() & {"norm.weight", "head.projection.weight"}  # as in SAM 2
        return state, ("head.", "norm.") if trunk_only else ("head.",)
    return state, ()


def _refuse(label: str, own: State, state: State, names: list[str]) -> None:
    """Raise UserError if there are `names`: tensors that are missing, extra or of another shape."""
    if not names:
        return
    missing, extra = (tuple(n for n in names if n in those) for those in (own, state))
    if both := [n for n in missing if n in extra]:
        shapes = (tuple(tensors[both[0]].shape) for tensors in (state, own))
        why = "{} has shape {} in the weights and {} in the model".format(both[0], *shapes)
    else:
        why = f"it lacks {summary(missing)}" if missing else f"it also has {summary(extra)}"
    raise UserError(
        f"{label} cannot be loaded into this model: {why}; use weights of the same kind and size of model"
    )


def _shape(state: State, name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


# ---- other inputs ----------------------------------------------------------------------------------------


def inflate(state: State, model: Encoder) -> tuple[State, list[str]]:
    """Expand an image model's weights for a clip model; returns them and the names of changed tensors.

    A clip of identical frames then gives the image's tokens: the patch kernel is spread evenly over its three
    frames (arXiv 1705.07750), every time step has the image's positions, and temporal embeddings are zero.
    """
    if is_video(state) or not model.config.video or "pos_embed" not in state:
        return state, []
    state, steps = dict(state), model.units[0]
    kernel = state["patch_embed.proj.weight"]
    new = {"patch_embed.proj.weight": kernel.unsqueeze(2).expand(-1, -1, 3, -1, -1) / 3}
    new["pos_embed_spatial"] = state.pop("pos_embed")
    new["pos_embed_temporal"] = torch.zeros(1, steps, len(kernel))
    if "decoder_pos_embed" in state:
        new["decoder_pos_embed"] = state["decoder_pos_embed"].repeat(1, steps, 1)
        # Predictions are (channel, row, column) for images and (row, column, channel) for clips.
        for name in ("decoder_pred.weight", "decoder_pred.bias"):
            new[name] = state[name].unflatten(0, (kernel.shape[1], -1)).transpose(0, 1).flatten(0, 1)
    for name in state:
        if name.startswith("multi_scale_fusion_heads.") and name.endswith("weight"):
            new[name] = state[name].unsqueeze(2)
    return state | new, list(new)


def resample_positions(state: State, model: Encoder) -> tuple[State, list[str]]:
    """Resample position embeddings to the model's grid: bicubic in space, linear in time.

    Returns the weights and the names of changed tensors. Raises UserError if a source grid is not square.
    """
    own, state = model.state_dict(), dict(state)
    steps = state["pos_embed_temporal"].shape[1] if is_video(state) else 1
    t, h, w = model.units
    grids: dict[str, tuple[int, Grid]] = {  # time steps in the weights, grid in the model
        "pos_embed": (1, (1, h * UNIT, w * UNIT)),
        "pos_embed_spatial": (1, (1, h * UNIT, w * UNIT)),
        "pos_embed_temporal": (steps, (t, 1, 1)),
    }
    if isinstance(model, MaskedAutoencoder):
        grids["decoder_pos_embed"] = (steps, model.grid)
    changed = [n for n in grids if n in state and n in own and state[n].shape != own[n].shape]
    for name in changed:
        if state[name].ndim != own[name].ndim:
            fix = "a clip model has plain ones only" if model.config.video else "give it their abs_win"
            raise UserError(f"the weights have another kind of position embeddings than the model; {fix}")
        if own[name].ndim == 4:
            table = state[name].float()  # torch has no such kernel for half precision
            state[name] = F.interpolate(table, own[name].shape[2:], mode="bicubic", antialias=True)
        else:
            state[name] = resample(state[name], *grids[name])
    return state, changed


def resample(table: Tensor, steps: int, grid: Grid) -> Tensor:
    """Resample [1, steps * side * side, C] to [1, t * h * w, C] for grid (t, h, w)."""
    side = math.isqrt(table.shape[1] // steps)
    if steps * side * side != table.shape[1]:
        raise UserError(
            f"the position embeddings of {table.shape[1]} tokens are not those of a square input; "
            "use weights that were trained on square inputs"
        )
    x = table[0].float().unflatten(0, (steps, side, side)).permute(0, 3, 1, 2)
    if (side, side) != grid[1:]:
        x = F.interpolate(x, grid[1:], mode="bicubic", antialias=True)
    if steps != grid[0]:
        channels = x.shape[1]
        x = x.flatten(1).T[None]  # [1, C * h * w, t]
        x = F.interpolate(x, grid[0], mode="linear")[0].T.unflatten(1, (channels, *grid[1:]))
    return x.permute(0, 2, 3, 1).reshape(1, -1, table.shape[2]).to(table.dtype)
