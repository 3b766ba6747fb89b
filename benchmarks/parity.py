"""Compare our models with three others on the same random weights: `python -m benchmarks.parity`.

hiera-transformer is the authors' code (all names). timm has the classifiers, transformers the image models.
Limits are relative errors: outputs in float32 1e-5; gradients 1e-4, for all parameters as one vector in
float32 and for each parameter in float64. In float32, max pooling may choose the other of two values that
rounding made equal. That is correct, but its gradient differs. An accident does not repeat and a mistake
does, so after a miss two more inputs are tried. Initial values are compared by mean and deviation per kind
of parameter, in standard errors.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from models.formats import from_ours
from models.hiera import Hiera, HieraConfig
from models.mae import MaskedAutoencoder
from models.weights import load_weights
from models.zoo import SIZES, config_of
from pipelines.errors import UserError, run_cli

Pair = tuple[Tensor, Tensor]
FEWER = (1, 2, 3, 1)  # blocks for large and huge unless --full
OUTPUT_BAR, GRADIENT_BAR, INIT_BAR = 1e-5, 1e-4, 6.0


@dataclass(frozen=True)
class Peer:
    """Another implementation of one of our models: how to build, load and run it."""

    build: Callable[[HieraConfig, bool], nn.Module]
    kind: str  # format of its parameter names, as in models.formats
    run: Callable[[nn.Module, Tensor, Tensor | None], list[Tensor]]
    video: bool = False
    mae: bool = False


@dataclass(frozen=True)
class Row:
    """Result of a comparison: largest relative errors; standard errors for initial values."""

    name: str
    peer: str
    stages: tuple[int, ...]
    outputs: float
    gradient: float  # all parameters as one vector, float32
    gradients: float  # the worst parameter, float64
    init: float | None

    @property
    def passed(self) -> bool:
        """True if all are within their limits."""
        gradients = max(self.gradient, self.gradients)
        return self.outputs <= OUTPUT_BAR and gradients <= GRADIENT_BAR and (self.init or 0) <= INIT_BAR


def upstream_model(config: HieraConfig, mae: bool) -> nn.Module:
    """The authors' model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hiera

    video = {
        "q_stride": (1, 2, 2),
        "mask_unit_size": (1, 8, 8),
        "patch_kernel": (3, 7, 7),
        "patch_stride": (2, 4, 4),
        "patch_padding": (1, 3, 3),
        "sep_pos_embed": True,
    }
    settings: dict[str, Any] = {
        "input_size": config.input_size,
        "in_chans": config.in_chans,
        "embed_dim": config.width,
        "num_heads": config.heads,
        "stages": config.stages,
        **(video if config.video else {}),
    }
    if not mae:
        return hiera.Hiera(num_classes=config.num_classes, **settings)
    decoder = {
        "decoder_embed_dim": config.decoder_width,
        "decoder_depth": config.decoder_depth,
        "decoder_num_heads": config.decoder_heads,
    }
    return hiera.MaskedAutoencoderHiera(q_pool=config.mae_pools, **settings, **decoder)


def timm_model(config: HieraConfig, mae: bool) -> nn.Module:
    """timm's classifier."""
    from timm.models.hiera import Hiera as TimmHiera

    return TimmHiera(
        img_size=config.input_size,  # pyrefly: ignore
        in_chans=config.in_chans,
        embed_dim=config.width,
        num_heads=config.heads,
        num_classes=config.num_classes,
        stages=config.stages,
        abs_win_pos_embed=config.abs_win,
        global_pos_size=config.global_pos_size,
        init_values=config.layer_scale or None,
        use_expand_proj=config.expand_proj,
    )


def transformers_model(config: HieraConfig, mae: bool) -> nn.Module:
    """transformers' image classifier or autoencoder."""
    from transformers import HieraConfig as TheirConfig
    from transformers import HieraForImageClassification, HieraForPreTraining

    settings = TheirConfig(
        image_size=config.input_size,
        num_channels=config.in_chans,
        embed_dim=config.width,
        depths=config.stages,
        num_heads=[config.heads << stage for stage in range(4)],
        num_query_pool=2 if mae else 3,
        decoder_hidden_size=config.decoder_width,
        decoder_depth=config.decoder_depth,
        decoder_num_heads=config.decoder_heads,
        num_labels=config.num_classes,  # pyrefly: ignore
    )
    return (HieraForPreTraining if mae else HieraForImageClassification)(settings)


def run_ours(model: nn.Module, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Logits and feature maps, or loss, predictions and labels."""
    if mask is not None:
        return list(model(x, mask=mask)[:3])
    logits, maps = model(x, return_intermediates=True)
    return [logits, *maps]


def _run_timm(model: Any, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    features, maps = model.forward_intermediates(x, output_fmt="NHWC")
    return [model.forward_head(features), *maps]


def _run_transformers(model: Any, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Its autoencoder takes noise instead of a mask, and returns no labels."""
    if mask is None:
        output = model(x, output_hidden_states=True)
        return [output.logits, *output.reshaped_hidden_states[1:]]
    output = model(x, noise=(~mask).to(x.dtype))
    return [output.loss, output.logits[~output.bool_masked_pos]]


PEERS = {
    "hiera-transformer": Peer(upstream_model, "upstream", run_ours, video=True, mae=True),
    "timm": Peer(timm_model, "timm", _run_timm),
    "transformers": Peer(transformers_model, "transformers", _run_transformers, mae=True),
}


def compare(name: str, peer_name: str, stages: tuple[int, ...] | None = None, **overrides: object) -> Row:
    """Compare our model `name` with a peer's, on seeded random weights and one seeded input."""
    torch.manual_seed(0)
    mae, peer = name.startswith("mae_"), PEERS[peer_name]
    config = config_of(name, stages=stages, **overrides)
    ours = (MaskedAutoencoder if mae else Hiera)(config).train()
    theirs = peer.build(config, mae).train()
    init = init_difference(theirs, ours) if peer_name == "hiera-transformer" else None
    randomise(theirs)
    load_weights(ours, theirs.state_dict(), quiet=True)
    x = torch.randn(1, config.in_chans, *config.input_size)
    mask = random_mask(ours) if isinstance(ours, MaskedAutoencoder) else None
    with torch.no_grad():
        outputs = _worst(zip(peer.run(theirs, x, mask), run_ours(ours, x, mask), strict=False))
    gradient = _distance(_gradients(theirs, ours, peer, x, mask))
    for _ in range(2):
        if gradient > GRADIENT_BAR:
            gradient = min(gradient, _distance(_gradients(theirs, ours, peer, torch.randn_like(x), mask)))
    double = _gradients(theirs.double(), ours.double(), peer, x.double(), mask)
    title = name + " abs_win" * config.abs_win
    return Row(title, peer_name, config.stages, outputs, gradient, _worst(double), init)


def _gradients(theirs: nn.Module, ours: nn.Module, peer: Peer, x: Tensor, mask: Tensor | None) -> list[Pair]:
    """(theirs, ours): each parameter's gradient of the loss, or of a weighted sum of the logits."""
    found = []
    for model, run in ((theirs, peer.run), (ours, run_ours)):
        model.zero_grad(set_to_none=True)
        first = run(model, x, mask)[0]
        (first * torch.linspace(-1, 2, first.numel(), dtype=x.dtype).view_as(first)).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, renamed = found[0], from_ours(found[1], peer.kind)
    if renamed.keys() != expected.keys():
        raise AssertionError(f"other parameters have gradients: {sorted(renamed.keys() ^ expected.keys())}")
    return [(expected[name], renamed[name]) for name in expected]


def random_mask(model: MaskedAutoencoder) -> Tensor:
    """A seeded mask of one row that keeps 40 % of an image's units, 10 % of a clip's."""
    units = model.num_mask_units
    kept = int(units * (0.1 if model.config.video else 0.4))
    return (torch.randperm(units) < kept)[None]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give all parameters, also norms and biases, random values of the size that training produces."""
    for name, parameter in model.named_parameters():
        parameter.copy_(0.05 * torch.randn_like(parameter))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)


def _worst(pairs: Iterable[Pair]) -> float:
    """Largest |a - b| / max |a| over pairs of tensors (a, b)."""
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def _distance(pairs: list[Pair]) -> float:
    """|a - b| / |a| of all tensors as one vector."""
    gap, size = (
        sum(t.square().sum().item() for t in ts) for ts in ([a - b for a, b in pairs], [a for a, _ in pairs])
    )
    return (gap / size) ** 0.5


@torch.no_grad()
def init_difference(theirs: nn.Module, ours: nn.Module) -> float:
    """Largest difference of mean or deviation over kinds of parameters, in standard errors."""
    groups = [_by_kind(theirs), _by_kind(ours)]
    worst = 0.0
    for kind, a in groups[0].items():
        b = groups[1][kind]
        error = (a.std(correction=0) * (2 / a.numel()) ** 0.5).item() + 1e-9
        gaps = (a.mean() - b.mean(), a.std(correction=0) - b.std(correction=0))
        worst = max(worst, *(abs(gap.item()) / error for gap in gaps))
    return worst


def _by_kind(model: nn.Module) -> dict[str, Tensor]:
    """Values of all parameters whose names differ only in the block number."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(parameter.flatten())
    return {kind: torch.cat(values).double() for kind, values in found.items()}


def cases(full: bool) -> list[tuple[str, str, tuple[int, ...] | None, dict[str, object]]]:
    """(name, peer, stages or None for all, overrides) of all comparisons."""
    found = []
    for peer_name, peer in PEERS.items():
        for mae in (False, True)[: 1 + peer.mae]:
            for video in (False, True)[: 1 + peer.video]:
                for size in SIZES:
                    if size == "pico" or (video and size in ("tiny", "small")):
                        continue
                    name = "mae_" * mae + f"hiera_{size}_" + ("16x224" if video else "224")
                    fewer = FEWER if size in ("large", "huge") and not full else None
                    found.append((name, peer_name, fewer, {}))
    window: dict[str, object] = {"abs_win": True, "input_size": 256, "global_pos_size": (16, 16)}
    return [
        *found,
        ("hiera_base_224", "timm", None, window),
        ("hiera_small_abswin_256", "timm", None, {}),
        ("mae_hiera_base_224", "hiera-transformer", None, {"mae_pools": 3}),
    ]


def check_parity(match: str = "", full: bool = False, threads: int = 2) -> None:
    """Compare every model with every peer and print a table; exit code 1 if a limit is exceeded.

    Args:
        match: regular expression; only matching "NAME PEER" are compared.
        full: also all blocks of large and huge (at least 24 GB of memory).
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    chosen = [case for case in cases(full) if re.search(match, f"{case[0]} {case[1]}")]
    if not chosen:
        raise UserError(
            f"nothing matches {match!r}; try a name such as hiera_base_224 or a peer, {', '.join(PEERS)}"
        )
    rows = []
    table = Table()
    for column in ("model", "peer", "blocks", "outputs", "fp32 grad", "fp64 grad", "init", ""):
        table.add_column(column, justify="left" if column in ("model", "peer", "blocks") else "right")
    for number, (name, peer, stages, overrides) in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {name} {peer}", file=sys.stderr, flush=True)
        rows.append(row := compare(name, peer, stages, **overrides))
        blocks = "-".join(map(str, row.stages)) + (" (fewer)" if stages else "")
        init = "-" if row.init is None else f"{row.init:.1f} s.e."
        errors = f"{row.outputs:.1e}", f"{row.gradient:.1e}", f"{row.gradients:.1e}", init
        table.add_row(row.name, row.peer, blocks, *errors, "ok" if row.passed else "FAILED")
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if not all(row.passed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(check_parity, description=__doc__))
