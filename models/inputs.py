"""Conversion of the loader's pixels to a model's input."""

import torch
from torch import Tensor, nn

# Mean and deviation per channel, for values in [0, 1]: ImageNet's, and those of SlowFast for clips.
IMAGE_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIDEO_STATS = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))


class NormalizedInput(nn.Module):
    """A model with normalization in front. The loader delivers bytes, and one graph computes both.

    `model` takes float32 [b, 3, (T,) H, W]. This module takes [b, (T,) H, W, 3], 0 to 255, uint8 or float.
    """

    offset: Tensor
    factor: Tensor

    def __init__(self, model: nn.Module, frames: int) -> None:
        super().__init__()
        self.model = model
        mean, deviation = (torch.tensor(s) * 255 for s in (IMAGE_STATS if frames == 1 else VIDEO_STATS))
        self.register_buffer("offset", mean, persistent=False)
        self.register_buffer("factor", 1 / deviation, persistent=False)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(x / 255 - mean) / deviation, channels first."""
        return ((pixels.float() - self.offset) * self.factor).movedim(-1, 1)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`: float32 [b, (T,) H, W, 3]; predicted pixels may leave 0 to 255."""
        return x.movedim(1, -1) / self.factor + self.offset

    def forward(self, pixels: Tensor, **given: Tensor) -> object:
        """The model's output for these pixels."""
        return self.model(self.normalize(pixels), **given)
