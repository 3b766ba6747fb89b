"""Loading weights: official .pth files, safetensors, plain state dicts; never by unpickling code."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.errors import ModelError

State = dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor; names are ours."""

    source: str
    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    fresh: tuple[str, ...]  # in the model, not in the file: left as initialised
    unused: tuple[str, ...]  # in the file, not in the model

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("resampled", "fresh", "unused"):
            names = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what} ({summary(names)})")
        return f"{self.source}: " + ", ".join(parts)


def summary(names: tuple[str, ...]) -> str:
    """Parameter names shortened to their modules, such as `decoder_blocks.*, norm.*`."""
    return ", ".join(dict.fromkeys(f"{n.split('.')[0]}.*" if "." in n else n for n in names))


def read_weights(path: Path) -> State:
    """Read a safetensors or PyTorch file into a flat state dict on the CPU.

    Raises ModelError when there is no file, or none that holds tensors alone.
    """
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path} is no weights file: {str(error).splitlines()[0]}") from error
    except Exception as error:  # safetensors' own error type
        raise ModelError(f"{path} is no weights file: {error}") from error
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(
            f"{path} holds no state dict; expected names and tensors, or those under 'model_state'"
        )
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in content.items()}


def load_weights(
    model: nn.Module,
    source: str | Path | State,
    *,
    reuse_encoder_norm: bool = False,
    allow_mismatch: bool = False,
    quiet: bool = False,
) -> LoadReport:
    """Load weights into `model` and print what was loaded, left fresh and unused.

    From autoencoder weights a classifier takes the encoder; its final norm and head stay fresh, as in the
    authors' code, or with `reuse_encoder_norm` the norm starts from `encoder_norm`, as in timm.
    A head for another number of classes is left out. Any other difference raises ModelError, unless
    `allow_mismatch`, which loads what fits.
    """
    state = dict(source) if isinstance(source, dict) else read_weights(Path(source))
    label = "weights" if isinstance(source, dict) else str(source)
    own = model.state_dict()
    may_miss: tuple[str, ...] = ()
    if "decoder_pos_embed" in state and "decoder_pos_embed" not in own:
        may_miss = ("norm.", "head.")
        if reuse_encoder_norm:
            state |= {f"norm.{part}": state.pop(f"encoder_norm.{part}") for part in ("weight", "bias")}
    elif _shape(state, "head.projection.weight") != _shape(own, "head.projection.weight"):
        may_miss = ("head.",)
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    fits = {n: v for n, v in state.items() if _shape(own, n) == v.shape}
    if not allow_mismatch:
        _check(label, own, state, {n for n in own if n not in state and not n.startswith(may_miss or "?")})
    model.load_state_dict(fits, strict=False)
    fresh, unused = (tuple(n for n in a if n not in fits) for a in (own, state))
    report = LoadReport(label, tuple(fits), (), fresh, unused)
    if not quiet:
        print(report)
    return report


def _shape(state: State, name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def _check(label: str, own: State, state: State, missing: set[str]) -> None:
    """Raise ModelError on missing names or other shapes."""
    if missing:
        raise ModelError(f"{label} does not fit this model: it lacks {summary(tuple(sorted(missing)))}")
    for name, value in state.items():
        if name in own and value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)} there, {tuple(own[name].shape)} here"
            raise ModelError(f"{label} does not fit this model: {name} is {shapes}")
