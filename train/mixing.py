"""Mixup and cutmix (arXiv 1710.09412, 1905.04899), drawn for all rows of a step's global batch.

In every group of 2 * repeats consecutive rows of the global batch, row k is mixed with row
(k + repeats) % (2 * repeats), so that a sample is not mixed with its own copy. The two rows of a pair share
one draw. Each process and micro batch uses the draws of its rows, so their number does not change the result.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import order
from pipelines.augment import to_device
from train.config import FinetuneConfig

# Columns of `draw_pairs`: the partner's share of the label, of the pixels outside the box, and the box.
LABEL, OUTSIDE, TOP, BOTTOM, LEFT, RIGHT = range(6)


def mix(
    config: FinetuneConfig, classes: int, pixels: Tensor, labels: Tensor, positions: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Mix consecutive rows of one step: pixels uint8 [b, (T,) H, W, 3] and labels int64 [b], on one device.

    config: mixup and cutmix are not both 0. positions: int64 [b], see Batch; the first row is the first of a
    group, and b is a multiple of 2 * repeats.
    Returns float32 pixels, all frames of a clip mixed alike, and soft labels float32 [b, classes].
    """
    height, width = pixels.shape[-3:-1]
    repeats = config.data.repeats
    step, first = divmod(int(positions[0]), config.optim.batch)
    rows = first + np.arange(len(positions))
    drawn = draw_pairs(config, step, height, width)[pairs_of(rows, repeats)]
    columns = to_device(drawn, pixels.device)
    share = pixel_shares(columns, height, width)
    share = share.view(len(share), *[1] * (pixels.dim() - 4), height, width, 1)
    mixed = pixels.to(torch.float32, copy=True).lerp_(partners(pixels, repeats).float(), share)
    soft = soft_labels(labels, classes, config.smoothing)
    return mixed, torch.lerp(soft, partners(soft, repeats), columns[:, LABEL, None])


def draw_pairs(config: FinetuneConfig, step: int, height: int, width: int) -> NDArray[np.float32]:
    """The draws of all pairs of a step, float32 [batch / 2, 6]; they depend on (seed, step) alone.

    If mixup and cutmix are both on, each is applied with probability 1/2. Cutmix's box has the share
    1 - lambda of the area before the border clips it; the label follows the clipped area.
    """
    key = order.keys_of(config.run.seed, order.STREAM_MIX, step, np.arange(2))
    generator, pairs = np.random.Generator(np.random.Philox(key=key)), config.optim.batch // 2
    cuts = generator.random(pairs) < (0.5 if config.mixup else 1.0) * (config.cutmix > 0)
    alphas = np.where(cuts, config.cutmix, config.mixup)
    partner = 1 - generator.beta(alphas, alphas)
    edges = []
    for size in (height, width):
        centre, length = generator.integers(0, size, pairs), (size * np.sqrt(partner)).astype(np.int64)
        edges += [np.clip(centre - length // 2, 0, size), np.clip(centre + (length + 1) // 2, 0, size)]
    top, bottom, left, right = (np.where(cuts, edge, 0) for edge in edges)
    area = (bottom - top) * (right - left) / (height * width)
    columns = (np.where(cuts, area, partner), np.where(cuts, 0, partner), top, bottom, left, right)
    return np.stack(columns, axis=1).astype(np.float32)


def pairs_of(rows: NDArray[np.int64], repeats: int) -> NDArray[np.int64]:
    """The pair that each row of the global batch belongs to."""
    return rows // (2 * repeats) * repeats + rows % repeats


def partners(x: Tensor, repeats: int) -> Tensor:
    """Each row's partner: x [b, ...] in another order."""
    return x.unflatten(0, (-1, 2, repeats)).flip(1).flatten(0, 2)


def pixel_shares(columns: Tensor, height: int, width: int) -> Tensor:
    """The partner's share of every pixel, float32 [b, H, W]: 1 inside the box."""
    y, x = (torch.arange(size, device=columns.device) for size in (height, width))
    rows = (y >= columns[:, TOP, None]) & (y < columns[:, BOTTOM, None])
    inside = rows[:, :, None] & ((x >= columns[:, LEFT, None]) & (x < columns[:, RIGHT, None]))[:, None]
    return torch.where(inside, 1.0, columns[:, OUTSIDE, None, None])


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot labels float32 [b, classes], of which the share `smoothing` is spread over all classes."""
    hit = labels[:, None] == torch.arange(classes, device=labels.device)
    return hit * (1 - smoothing) + smoothing / classes
