"""Multiply-accumulates of one forward pass, counted from the configuration (a training step is 3 of them)."""

import math

from models.hiera import HieraConfig
from models.mae import PATCH
from models.mae import POOLS as MAE_POOLS
from models.unroll import UNIT, unit_grid

# Dense bf16 multiply-adds and additions per second, by what the device's name contains.
BF16_PEAK = {
    "B200": 2250e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40": 181e12,
    "4090": 165e12, "3090": 71e12, "A10G": 70e12,
}  # fmt: skip


def bf16_peak(device_name: str) -> float | None:
    """Operations per second that the device can do at most, None where it is not known."""
    return next((peak for key, peak in BF16_PEAK.items() if key in device_name), None)


def forward_macs(config: HieraConfig, mae: bool = False, mask_ratio: float = 0.6) -> int:
    """Multiply-accumulates per sample, of the classifier or of the autoencoder at `mask_ratio`."""
    units = math.prod(unit_grid(config.input_size))
    if not mae:
        width = config.width * 8
        return sum(_encoder(config, units, pools=3)) + width * config.num_classes
    kept = int(units * (1 - mask_ratio))
    return sum(_encoder(config, kept, MAE_POOLS)) + _decoder(config, units, kept)


def block_macs(tokens: int, keys: int, dim: int, dim_out: int, pool: int = 1) -> int:
    """One block on `tokens` that each attend to `keys`; queries shrink by `pool`."""
    queries = tokens // pool
    qkv = tokens * dim * 3 * dim_out
    skip = tokens * dim * dim_out if dim != dim_out else 0
    attention = 2 * queries * keys * dim_out
    return qkv + skip + attention + queries * dim_out**2 * (1 + 8)


def _encoder(config: HieraConfig, units: int, pools: int) -> list[int]:
    """Patch embedding, then each block, over `units` mask units."""
    per_unit = UNIT * UNIT
    taps = config.in_chans * 49 * (3 if config.video else 1)
    macs = [units * per_unit * taps * config.width]
    for stage, depth in enumerate(config.stages):
        dim = config.width << stage
        for number in range(depth):
            first = number == 0 and stage > 0
            windowed = stage < 2 or (stage == 2 and first)
            pool = 4 if first and stage <= pools else 1
            keys = per_unit if windowed else units * per_unit
            macs.append(block_macs(units * per_unit, keys, dim // 2 if first else dim, dim, pool))
            per_unit //= pool
    return macs


def _decoder(config: HieraConfig, units: int, kept: int) -> int:
    """Fusion heads, decoder blocks over kept and decoded tokens, and the prediction of the latter."""
    cells, out = 4, config.width * 8
    decoded = round((units - kept) * cells * config.decode_ratio)
    tokens = kept * cells + decoded
    fusion = kept * UNIT * UNIT * config.width * out + kept * UNIT * UNIT // 4 * 2 * config.width * out
    blocks = config.decoder_depth * block_macs(tokens, tokens, config.decoder_width, config.decoder_width)
    ends = kept * cells * out + decoded * PATCH * PATCH * config.in_chans
    return fusion + blocks + ends * config.decoder_width
