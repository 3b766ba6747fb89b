"""Models by name and their costs; `python -m models.zoo` prints a table of them.

Names are `[mae_]hiera_SIZE_224` for images and `[mae_]hiera_SIZE_16x224` for clips. The small `pico` models
for CPUs are `[mae_]hiera_pico_96` and `[mae_]hiera_pico_16x64`. `[mae_]hiera_small_abswin_256` and
`[mae_]hiera_base_abswin_224` have absolute-window position embeddings.
"""

import difflib
import math
import re
from dataclasses import fields, replace
from functools import cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.formats import State, is_video, stage_depths
from models.hiera import Hiera, HieraConfig
from models.mae import MaskedAutoencoder
from models.unroll import FRAMES, STRIDE, UNIT
from pipelines.errors import UserError


class Size(NamedTuple):
    """Everything that the models of one size have of their own."""

    width: int  # channels of the first stage
    heads: int  # of the first stage
    stages: tuple[int, int, int, int]  # blocks of each
    side: int = 224  # pixels of an image
    clip_side: int = 224  # pixels of a clip's frame
    decoder: tuple[int, int, int] = (512, 8, 16)  # width, blocks, heads


# From arXiv 2306.00989, table 2. pico is not in the paper.
SIZES = {
    "pico": Size(48, 1, (1, 2, 4, 1), side=96, clip_side=64, decoder=(128, 2, 4)),
    "tiny": Size(96, 1, (1, 2, 7, 2)),
    "small": Size(96, 1, (1, 2, 11, 2)),
    "base": Size(96, 1, (2, 3, 16, 3)),
    "base_plus": Size(112, 2, (2, 3, 16, 3)),
    "large": Size(144, 2, (2, 6, 36, 4)),
    "huge": Size(256, 4, (2, 6, 36, 4)),
}
# Top-1 accuracy of the finetuned classifiers: ImageNet-1K, Kinetics-400 with 15 views (arXiv 2306.00989).
PUBLISHED = {
    "tiny": (82.8, None),
    "small": (83.8, None),
    "base": (84.5, 84.0),
    "base_plus": (85.2, 85.0),
    "large": (86.1, 87.3),
    "huge": (86.9, 87.8),
}
CLASSIFIER_ONLY = {"num_classes", "head_dropout"}
DECODER_ONLY = {
    "decoder_width",
    "decoder_depth",
    "decoder_heads",
    "decode_ratio",
    "normalize_targets",
    "mae_pools",
}
# Dense bf16 operations per second with fp32 accumulation, without sparsity, from NVIDIA's data sheets and
# architecture papers. The keys are the exact names that torch.cuda.get_device_name returns: variants of one
# chip differ by a factor of up to 2, and a MIG slice has its own name.
BF16_PEAK = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def _configs() -> dict[str, HieraConfig]:
    configs = {}
    for name, size in SIZES.items():
        width, depth, heads = size.decoder
        image = HieraConfig(
            input_size=(size.side, size.side), width=size.width, heads=size.heads, stages=size.stages,
            decoder_width=width, decoder_depth=depth, decoder_heads=heads,
        )  # fmt: skip
        clip = replace(image, input_size=(16, size.clip_side, size.clip_side), num_classes=400)
        configs |= {f"hiera_{name}_{size.side}": image, f"hiera_{name}_16x{size.clip_side}": clip}
    # The structures of weights by timm (small) and birder (base), which docs/weights.md lists.
    configs["hiera_small_abswin_256"] = replace(
        configs["hiera_small_224"], input_size=(256, 256), abs_win=True, global_pos_size=(16, 16),
        layer_scale=1e-5, expand_proj=False,
    )  # fmt: skip
    configs["hiera_base_abswin_224"] = replace(configs["hiera_base_224"], abs_win=True, mae_pools=3)
    return configs


CONFIGS = _configs()


def list_models() -> list[str]:
    """All names that `create` accepts: classifiers, then autoencoders."""
    return [*CONFIGS, *(f"mae_{name}" for name in CONFIGS)]


def create(name: str, **overrides: object) -> Hiera | MaskedAutoencoder:
    """Build a model with random weights.

    overrides: fields of HieraConfig, such as input_size (an int is the side of a square; the number of
    frames does not change), num_classes, in_chans, drop_path_rate, head_dropout. None keeps the default.
    Raises UserError for an unknown name or setting, and for a size that is not a multiple of the mask unit.
    """
    config = config_of(name, **overrides)
    return MaskedAutoencoder(config) if name.startswith("mae_") else Hiera(config)


def config_of(name: str, **overrides: object) -> HieraConfig:
    """The configuration of the model that `create` builds from the same arguments; raises the same errors."""
    if name not in list_models():
        raise UserError(f"there is no model {name!r}; {_suggestion(name, list_models())}")
    config = CONFIGS[name.removeprefix("mae_")]
    given = {key: value for key, value in overrides.items() if value is not None}
    other = CLASSIFIER_ONLY if name.startswith("mae_") else DECODER_ONLY
    allowed = sorted({field.name for field in fields(HieraConfig)} - other)
    for key in given:
        if key not in allowed:
            raise UserError(f"{name} has no setting {key!r}; {_suggestion(key, allowed)}")
    if "input_size" in given:
        given["input_size"] = _full_size(given["input_size"], config.input_size)
    return replace(config, **given)  # pyrefly: ignore


def config_of_weights(state: State, side: int = 0) -> HieraConfig:
    """The configuration of the encoder, or classifier, that has these weights with our names.

    side: of the square input (pixels), for absolute-window position embeddings, which do not show it; 0: 16
    times that of their global part, as in the released weights.
    Raises UserError unless `SIZES` gives the number of heads, which the weights do not show: that of a size
    with these width and blocks, or else that of all sizes with this width.
    """
    width, channels = state["patch_embed.proj.weight"].shape[:2]
    stages = tuple(stage_depths(state))
    alike = [size for size in SIZES.values() if size.width == width]
    heads = {size.heads for size in alike if size.stages == stages} or {size.heads for size in alike}
    if len(heads) != 1:
        which = f"sizes of {sorted(heads)} heads have" if heads else "no known size has"
        raise UserError(
            f"{which} width {width}, so the heads of these weights are unknown; convert it to a weights file"
        )
    table = state["pos_embed_spatial" if is_video(state) else "pos_embed"]
    abs_win, grid = table.ndim == 4, tuple(table.shape[2:])
    side = (side or 16 * grid[0]) if abs_win else STRIDE * math.isqrt(table.shape[1])
    frames = (FRAMES * state["pos_embed_temporal"].shape[1],) if is_video(state) else ()
    return HieraConfig(
        input_size=(*frames, side, side),
        in_chans=channels,
        width=width,
        heads=heads.pop(),
        stages=stages,  # pyrefly: ignore
        abs_win=abs_win,
        global_pos_size=grid if abs_win else HieraConfig.global_pos_size,  # pyrefly: ignore
        layer_scale=float("blocks.0.ls1.gamma" in state),
        expand_proj=any(re.fullmatch(r"blocks\.\d+\.proj\.weight", name) for name in state),
        num_classes=len(state.get("head.projection.bias", ())),
    )


def _full_size(size: object, default: tuple[int, ...]) -> tuple[int, ...]:
    """The input size as a tuple; an int becomes a square with the default's number of frames."""
    full = (*default[:-2], size, size) if isinstance(size, int) else tuple(size)  # pyrefly: ignore
    if len(full) != len(default):
        axes = "(T, H, W)" if len(default) == 3 else "(H, W)"
        raise UserError(f"input_size {size} does not fit this model; give the side of a square or {axes}")
    return full


def _suggestion(word: str, known: list[str]) -> str:
    """The closest known word, or all known words."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


# ---- costs -----------------------------------------------------------------------------------------------


def bf16_peak(device_name: str) -> float | None:
    """Peak operations per second of a GPU, None if its name is not in the table."""
    return BF16_PEAK.get(device_name)


@cache
def forward_macs(config: HieraConfig, mae: bool = False, mask_ratio: float = 0.6) -> int:
    """Multiply-accumulates of one sample's forward pass; a training step has three times as many.

    They are counted on the meta device, so nothing is computed. mae: of the autoencoder, at `mask_ratio`.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"):
        model = MaskedAutoencoder(config) if mae else Hiera(config)
        x = torch.empty(1, config.in_chans, *config.input_size)
        with counter:  # the counter slows every operation, so the initialization is outside
            _ = model(x, mask_ratio=mask_ratio) if mae else model(x)
    return counter.get_total_flops() // 2


def main() -> None:
    """Print the table of models."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="GMACs of autoencoders: mask ratio 0.6 for images, 0.9 for clips")
    for column in ("model", "params (M)", "GMACs", "tokens", "mask units", "published top-1"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in list_models():
        with torch.device("meta"):
            model = create(name)
        config, mae = model.config, name.startswith("mae_")
        params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        macs = forward_macs(config, mae, mask_ratio=0.9 if config.video else 0.6) / 1e9
        size = name.split("hiera_")[1].rsplit("_", 1)[0]
        top1 = None if mae else PUBLISHED.get(size, (None, None))[config.video]
        units = "x".join(map(str, model.mask_units))
        tokens = math.prod(model.units) * UNIT * UNIT
        table.add_row(name, f"{params:.1f}", f"{macs:.1f}", str(tokens), units, f"{top1 or '-'}")
    Console(width=None if Console().is_terminal else 110).print(table)


if __name__ == "__main__":
    main()
