"""Loading weights of any known format into a model, with a report of what became of every tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models.adapt import inflate, resample_positions
from models.errors import ModelError
from models.files import Weights, read_weights, unwrap
from models.formats import AUTOENCODER_ONLY, State, is_autoencoder, to_ours
from models.hiera import Encoder
from models.mae import MaskedAutoencoder
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
    notes: tuple[str, ...] = ()  # what else should be known, a clause each

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
    """Load weights into `model` and print what was loaded, resampled, left fresh and unused.

    source: a file, folder or state dict of upstream, timm, transformers or ours (see files.py), or an
    official name such as `mae_hiera_base_16x224:mae_k400` (see official.py).
    classes: the class names of the model's outputs, if known; the report compares them with the source's.
    A classifier takes the encoder of autoencoder weights; its final norm and head stay fresh, as in the
    authors' code, or with `reuse_encoder_norm` the norm starts from `encoder_norm`, as in timm. A head for
    another number of classes is left out. Position embeddings are resampled to the model's input size,
    and a clip model takes image weights inflated. Any other difference raises ModelError, and so do values
    that are not finite and a decoder that is known to have another number of heads.
    """
    if not isinstance(model, Encoder):
        raise ModelError(f"load_weights takes a model that models.create built, not a {type(model).__name__}")
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
    """Weights by path or official name, or a state dict that may be wrapped."""
    if not isinstance(source, dict):
        return read_weights(path_of(str(source)))
    state, note = unwrap(source, "weights")
    return Weights(Path("weights"), state, note)


def _check_decoder(label: str, state: State, heads: int, model: Encoder) -> None:
    """Raise ModelError if the decoder has another number of heads, which its shapes do not show."""
    if not isinstance(model, MaskedAutoencoder) or not is_autoencoder(state):
        return
    if heads and heads != model.config.decoder_heads:
        raise ModelError(
            f"{label}: the decoder has {heads} heads there and {model.config.decoder_heads} here; "
            f"create the model with decoder_heads {heads} (--decoder-heads {heads})"
        )


def _check_finite(label: str, state: State) -> None:
    """Raise ModelError if a tensor holds NaN or infinity."""
    for name, value in state.items():
        if not value.float().isfinite().all():
            raise ModelError(
                f"{label} has values that are not finite (NaN or infinity), first in {name}; "
                "give weights from before its training diverged, such as an earlier checkpoint"
            )


def _head_note(loaded: State, theirs: Sequence[str], ours: Sequence[str]) -> str:
    """A clause about a classifier's head that is reused, unless its classes are known to be the same."""
    if "head.projection.weight" not in loaded:
        return ""
    count = len(loaded["head.projection.weight"])
    reused = f"the head of {count} classes is reused"
    if not len(theirs) == len(ours) == count:
        return f"{reused}; its classes are assumed to be the same"
    for number, (there, here) in enumerate(zip(theirs, ours, strict=True)):
        if there != here:
            return f"{reused}, but class {number} is {there!r} there and {here!r} here"
    return ""


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
