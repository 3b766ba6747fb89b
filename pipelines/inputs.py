"""Pixels as the data path delivers them -> what a model takes."""

import torch

# Per channel, of values in [0, 1]: ImageNet's, and the ones video models have used since SlowFast.
IMAGE_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIDEO_STATS = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))


def normalise(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(x / 255 - mean) / std: uint8 [b, (T,) H, W, 3] -> float32 [b, 3, (T,) H, W].

    Pure torch, to be compiled into the step: bytes, not floats, cross from the loader.
    """
    offset = torch.tensor(mean, device=pixels.device) * 255
    factor = 1 / (torch.tensor(std, device=pixels.device) * 255)
    return ((pixels.float() - offset) * factor).movedim(-1, 1)
