"""Augmentation of uint8 batches in place, on CPU or GPU: RandAugment, color jitter, random erasing.

Parameters are drawn on the host from (seed, epoch, sample), one set per row, so a clip's frames all get
the same treatment. Nothing waits for the device: constants are made on it, because an upload from pageable
memory waits until the device has done all work before it. Statistics that an operation needs (the mean gray
of `contrast`, the range of `autocontrast`, the histogram of `equalize`) are taken frame by frame.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines import order
from pipelines.config import Augment
from pipelines.views import Rows


def augment(pixels: Tensor, rows: Rows, config: Augment, seed: int) -> None:
    """Augment the uint8 pixels [b, H, W, 3] or [b, T, H, W, 3] of these rows in place."""
    clips = pixels if pixels.dim() == 5 else pixels.unsqueeze(1)
    draw = partial(order.uniform, seed, rows.epochs, rows.ids)
    if config.jitter > 0:
        jitter(clips, config.jitter, draw(order.STREAM_JITTER, 3))
    for layer in range(config.layers):
        rand_layer(clips, config, draw(order.STREAM_RAND + layer, 5))
    if config.erase > 0:
        erase(clips, config.erase, draw(order.STREAM_ERASE, 24))


def to_device(values: NDArray | Tensor, device: torch.device) -> Tensor:
    """Copy small host data to the device without waiting for it: from pinned memory on CUDA.

    Arrays of floats become float32.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values = values.astype(np.float32)
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def rand_layer(rows: Tensor, config: Augment, draws: NDArray[np.float64]) -> None:
    """One RandAugment operation per row of uint8 [b, T, H, W, 3], in place; `draws` is [b, 5]."""
    chosen = np.where(draws[:, 1] < config.probability, (draws[:, 0] * len(OPERATIONS)).astype(int), -1)
    signs = np.where(draws[:, 2] < 0.5, -1.0, 1.0)
    normal = np.sqrt(-2 * np.log1p(-draws[:, 3])) * np.cos(2 * np.pi * draws[:, 4])  # Box and Muller 1958
    levels = np.clip(config.magnitude + config.magnitude_std * normal, 0, 10) / 10
    for number, (operation, strength) in enumerate(OPERATIONS.values()):
        picked = np.flatnonzero(chosen == number)
        if len(picked):
            values = to_device(strength(levels[picked], signs[picked]), rows.device).view(-1, 1, 1, 1, 1)
            index = to_device(picked, rows.device)
            rows[index] = operation(rows[index], values)


def constants(pixels: Tensor, *values: float) -> Tensor:
    """float32 [n] made on the device of `pixels`, without an upload."""
    return torch.stack([torch.full((), float(value), device=pixels.device) for value in values])


def blend(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """other + factor * (pixels - other) as uint8: factor 1 leaves the pixels as they are."""
    return (other + factor * (pixels - other)).clamp_(0, 255).to(torch.uint8)


def gray(pixels: Tensor) -> Tensor:
    """Luma (ITU-R 601) in whole levels, float32 [..., 1]."""
    return (pixels.float() @ constants(pixels, 0.299, 0.587, 0.114)).add_(0.5).floor_().unsqueeze(-1)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return blend(torch.zeros((), device=pixels.device), pixels.float(), factor)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    return blend((gray(pixels).mean(dim=(2, 3), keepdim=True) + 0.5).floor(), pixels.float(), factor)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return blend(gray(pixels), pixels.float(), factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed copy (3 x 3, center weight 5), whose outermost pixels are not smoothed."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    smooth = pixels.float()
    planes = smooth.flatten(0, 1).permute(0, 3, 1, 2)
    inner = F.conv2d(planes, kernel / 13, groups=3).add_(0.5).floor_().permute(0, 2, 3, 1)
    smooth = smooth.clone()
    smooth[:, :, 1:-1, 1:-1] = inner.unflatten(0, pixels.shape[:2])
    return blend(smooth, pixels.float(), factor)


def autocontrast(pixels: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to span 0 to 255."""
    low, high = (pick(pixels.float(), dim=(2, 3), keepdim=True) for pick in (torch.amin, torch.amax))
    stretched = ((pixels - low) * (255 / (high - low).clamp_min(1))).clamp_(0, 255)
    return torch.where(high > low, stretched, pixels.float()).to(torch.uint8)


def equalize(pixels: Tensor, _: Tensor) -> Tensor:
    """Flatten each channel's histogram, by Pillow's integer rule."""
    from torchvision.transforms.v2 import functional  # here: it takes a second

    return functional.equalize(pixels.movedim(-1, -3)).movedim(-3, -1)


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` bits of each level."""
    return pixels & (256 - 2 ** (8 - bits)).to(torch.uint8)


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(pixels < threshold, pixels, 255 - pixels)


def solarize_add(pixels: Tensor, amount: Tensor) -> Tensor:
    return torch.where(pixels < 128, (pixels + amount).clamp(max=255).to(torch.uint8), pixels)


def affine(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Row i's pixel at (x, y) is taken from matrices[i] (x, y, 1), in pixels; gray 128 from outside.

    Pixels are [g, T, H, W, 3] and matrices [g, 2, 3]; bilinear.
    """
    group, frames, height, width, _ = pixels.shape
    x = torch.arange(width, device=pixels.device) + 0.5
    y = torch.arange(height, device=pixels.device) + 0.5
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    points = torch.einsum("hwk,gck->ghwc", F.pad(points, (0, 1), value=1.0), matrices)
    grid = 2 * points / constants(pixels, width, height) - 1
    planes = pixels.permute(0, 1, 4, 2, 3).reshape(group, frames * 3, height, width).float() - 128
    moved = F.grid_sample(planes, grid, align_corners=False).add_(128.5).clamp_(0, 255).to(torch.uint8)
    return moved.unflatten(1, (frames, 3)).permute(0, 1, 3, 4, 2)


def shift(pixels: Tensor, share: Tensor, row: int, column: int) -> Tensor:
    """Shift pixels along x (row 0) or y (row 1).

    Column 2 translates by a share of the width or height; column 1 - row shears: the distance is a share of
    the pixel's distance from the other axis.
    """
    matrices = torch.eye(2, 3, device=pixels.device).repeat(len(pixels), 1, 1)
    matrices[:, row, column] = share.flatten() * (pixels.shape[3 - row] if column == 2 else 1)
    return affine(pixels, matrices)


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Turn about the center, counter-clockwise."""
    angle = degrees.flatten() * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = pixels.shape[3] / 2, pixels.shape[2] / 2
    top = torch.stack([cos, -sin, x - cos * x + sin * y], dim=-1)
    bottom = torch.stack([sin, cos, y - sin * x - cos * y], dim=-1)
    return affine(pixels, torch.stack([top, bottom], dim=1))


Operation = Callable[[Tensor, Tensor], Tensor]
Strength = Callable[[NDArray, NDArray], NDArray]  # (level in [0, 1], sign) -> what the operation takes


def enhance(level: NDArray, sign: NDArray) -> NDArray:
    """The factor of a blend: 1 at level 0, as far below 1 as above it."""
    return np.maximum(0.1, 1 + 0.9 * level * sign)


# RandAugment's operations and how strong each is at a level, in the "increasing" form of timm
# ("rand-m9-mstd0.5-inc1"), in which a higher magnitude always means a stronger change.
OPERATIONS: dict[str, tuple[Operation, Strength]] = {
    "autocontrast": (autocontrast, lambda level, sign: level),
    "equalize": (equalize, lambda level, sign: level),
    "invert": (lambda pixels, _: 255 - pixels, lambda level, sign: level),
    "rotate": (rotate, lambda level, sign: 30 * level * sign),
    "posterize": (posterize, lambda level, sign: 4 - np.floor(4 * level)),
    "solarize": (solarize, lambda level, sign: 256 - np.floor(256 * level)),
    "solarize_add": (solarize_add, lambda level, sign: np.floor(110 * level)),
    "saturation": (saturation, enhance),
    "contrast": (contrast, enhance),
    "brightness": (brightness, enhance),
    "sharpness": (sharpness, enhance),
    "shear_x": (partial(shift, row=0, column=1), lambda level, sign: 0.3 * level * sign),
    "shear_y": (partial(shift, row=1, column=0), lambda level, sign: 0.3 * level * sign),
    "translate_x": (partial(shift, row=0, column=2), lambda level, sign: 0.45 * level * sign),
    "translate_y": (partial(shift, row=1, column=2), lambda level, sign: 0.45 * level * sign),
}


def jitter(rows: Tensor, amount: float, draws: NDArray[np.float64]) -> None:
    """Brightness, contrast and saturation by factors from 1 +- amount, in place; `draws` is [b, 3]."""
    factors = to_device(np.maximum(0, 1 + amount * (2 * draws - 1)), rows.device)
    for column, operation in enumerate((brightness, contrast, saturation)):
        rows.copy_(operation(rows, factors[:, column].view(-1, 1, 1, 1, 1)))


def erase(rows: Tensor, probability: float, draws: NDArray[np.float64]) -> None:
    """Fill a rectangle of 2 to 33 % of the area with noise, the same one in all frames; in place.

    `draws` is [b, 24]: whether, the place, the noise's seed, and ten tries of (area, log aspect ratio).
    """
    height, width = rows.shape[2:4]
    generator = torch.Generator(rows.device)
    area = height * width * (0.02 + (1 / 3 - 0.02) * draws[:, 4:24:2])
    aspect = np.exp(np.log(0.3) * (2 * draws[:, 5:24:2] - 1))
    tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (tall < height) & (wide < width)
    for row in np.flatnonzero((draws[:, 0] < probability) & fits.any(axis=1)):
        first = fits[row].argmax()
        h, w = int(tall[row, first]), int(wide[row, first])
        y, x = int(draws[row, 1] * (height - h + 1)), int(draws[row, 2] * (width - w + 1))
        hole = rows[row, :, y : y + h, x : x + w]
        generator.manual_seed(int(draws[row, 3] * 2**53))
        noise = torch.randn(hole.shape, generator=generator, device=rows.device)
        hole.copy_((noise * 57 + 115).clamp_(0, 255))  # about the spread of natural images
