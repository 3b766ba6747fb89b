"""Loading weights of any known format into a model, with a report of what became of every tensor."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models.adapt import inflate, resample_positions
from models.errors import ModelError
from models.formats import AUTOENCODER_ONLY, State, is_autoencoder, read_weights, to_ours
from models.hiera import Encoder
from models.official import path_of


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, by our names."""

    source: str
    loaded: tuple[str, ...]  # as they were
    resampled: tuple[str, ...]  # position embeddings brought to another grid
    inflated: tuple[str, ...]  # image weights turned into a clip model's
    fresh: tuple[str, ...]  # in the model alone: left as initialised
    unused: tuple[str, ...]  # in the source alone

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("resampled", "inflated", "fresh", "unused"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what} ({summary(names)})")
        return f"{self.source}: " + ", ".join(parts)


def summary(names: tuple[str, ...]) -> str:
    """Parameter names shortened to their modules, such as `decoder_blocks.*, norm.*`."""
    return ", ".join(dict.fromkeys(f"{n.split('.')[0]}.*" if "." in n else n for n in names))


def load_weights(
    model: nn.Module,
    source: str | Path | State,
    *,
    reuse_encoder_norm: bool = False,
    quiet: bool = False,
) -> LoadReport:
    """Load weights into `model` and print what was loaded, resampled, left fresh and unused.

    source: a file or state dict of upstream, timm, transformers or ours, or an official name such as
    `mae_hiera_base_16x224:mae_k400` (see official.py).
    A classifier takes the encoder of autoencoder weights; its final norm and head stay fresh, as in the
    authors' code, or with `reuse_encoder_norm` the norm starts from `encoder_norm`, as in timm. A head for
    another number of classes is left out. Position embeddings are resampled to the model's input size,
    and a clip model takes image weights inflated. Any other difference raises ModelError.
    """
    if not isinstance(model, Encoder):
        raise ModelError(f"load_weights takes a model that models.create built, not a {type(model).__name__}")
    label = "weights" if isinstance(source, dict) else str(source)
    state = to_ours(source if isinstance(source, dict) else read_weights(path_of(str(source))))
    state, inflated = inflate(state, model)
    state, resampled = resample_positions(state, model)
    own = model.state_dict()
    state, optional = _match_heads(state, own, reuse_encoder_norm)
    fits = {n: v for n, v in state.items() if _shape(own, n) == v.shape}
    fresh, unused = (tuple(n for n in names if n not in fits) for names in (own, state))
    _refuse(label, own, state, [n for n in (*fresh, *unused) if not n.startswith(optional)])
    model.load_state_dict(fits, strict=False)
    inflated = tuple(n for n in inflated if n in fits and n not in resampled)
    loaded = tuple(n for n in fits if n not in (*resampled, *inflated))
    report = LoadReport(label, loaded, tuple(resampled), inflated, fresh, unused)
    if not quiet:
        print(report)
    return report


def _match_heads(state: State, own: State, reuse_encoder_norm: bool) -> tuple[State, tuple[str, ...]]:
    """Settle what may differ at the end of the network: the weights, and prefixes free to be missing."""
    if is_autoencoder(state) and not is_autoencoder(own):
        if reuse_encoder_norm:
            state |= {f"norm.{part}": state.pop(f"encoder_norm.{part}") for part in ("weight", "bias")}
        return state, ("norm.", "head.", *AUTOENCODER_ONLY)
    if _shape(state, "head.projection.weight") != _shape(own, "head.projection.weight"):
        return state, ("head.",)
    return state, ()


def _refuse(label: str, own: State, state: State, names: list[str]) -> None:
    """Raise ModelError if any names are left over or differ in shape."""
    for name in names:
        if name in own and name in state:
            shapes = f"{tuple(state[name].shape)} there, {tuple(own[name].shape)} here"
            raise ModelError(f"{label} cannot be loaded into this model: {name} is {shapes}")
    missing, extra = (tuple(n for n in names if n in those) for those in (own, state))
    if names:
        lacks = f"it lacks {summary(missing)}" if missing else f"it also has {summary(extra)}"
        raise ModelError(f"{label} cannot be loaded into this model: {lacks}")


def _shape(state: State, name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
