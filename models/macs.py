"""Multiply-accumulates of one forward pass, counted without computing it (a training step is 3 of them)."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.hiera import Hiera, HieraConfig
from models.mae import MaskedAutoencoder

# Dense bf16 operations per second with fp32 accumulation, without sparsity, from NVIDIA's data sheets and
# architecture papers, by the exact name that torch.cuda.get_device_name gives. Variants of one chip differ by
# a factor of up to 2, and a MIG slice has a name of its own.
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


def bf16_peak(device_name: str) -> float | None:
    """Operations per second that the device can do at most, None where the name is not in the table."""
    return BF16_PEAK.get(device_name)


def forward_macs(config: HieraConfig, mae: bool = False, mask_ratio: float = 0.6) -> int:
    """Multiply-accumulates per sample, of the classifier or of the autoencoder at `mask_ratio`."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"):
        model = MaskedAutoencoder(config) if mae else Hiera(config)
        x = torch.empty(1, config.in_chans, *config.input_size)
        with counter:  # which slows each operation: initialisation stays outside
            _ = model(x, mask_ratio=mask_ratio) if mae else model(x)
    return counter.get_total_flops() // 2
