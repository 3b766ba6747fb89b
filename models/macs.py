"""Multiply-accumulates of one forward pass, counted without computing it (a training step is 3 of them)."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.hiera import Hiera, HieraConfig
from models.mae import MaskedAutoencoder

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
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"):
        model = MaskedAutoencoder(config) if mae else Hiera(config)
        x = torch.empty(1, config.in_chans, *config.input_size)
        with counter:  # which slows each operation: initialisation stays outside
            _ = model(x, mask_ratio=mask_ratio) if mae else model(x)
    return counter.get_total_flops() // 2
