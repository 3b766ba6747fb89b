"""The layers of Hiera; x is [batch, units, tokens per unit, channels] (see unroll.py)."""

import math

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from models.unroll import FRAMES, STRIDE, UNIT, Grid, gather_cells, max_pool, mean_pool, unroll

KERNEL, PADDING = 7, 3  # of the patch embedding, in pixels; in time it has 3 frames and pads 1 in front
HALO = KERNEL - STRIDE  # pixels above and left of a unit that its tokens depend on
NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention inside mask units (`windowed`) or over all tokens.

    pool: queries are max-pooled 2x2, so the output has a quarter of the tokens.
    """

    def __init__(
        self, dim: int, dim_out: int, heads: int, windowed: bool = False, pool: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.windowed, self.pool = heads, windowed, pool
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, U, n, dim] -> [B, U, n or n / 4, dim_out]."""
        batch, units = x.shape[:2]
        # Windows are folded into the batch: PyTorch's fused kernels take four dimensions only.
        windows = batch * units if self.windowed else batch
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.pool:
            q = max_pool(q)
        q, k, v = (z.reshape(windows, -1, self.heads, z.shape[-1] // self.heads) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).reshape(batch, units, -1, self.proj.in_features))


class Block(nn.Module):
    """Pre-norm transformer block; the first block of a stage widens the channels and may pool.

    layer_scale: initial value of the learned scales of both branches (arXiv 2103.17239); 0 = none.
    expand_proj: a linear layer widens the residual stream. Otherwise its max and mean pooling do, as in timm.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        windowed: bool = False,
        pool: bool = False,
        layer_scale: float = 0.0,
        expand_proj: bool = True,
    ) -> None:
        super().__init__()
        self.widens = dim != dim_out
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, dim_out, heads, windowed, pool)
        self.norm2 = nn.LayerNorm(dim_out, eps=NORM_EPS)
        self.mlp = Mlp(dim_out, 4 * dim_out)
        self.proj = nn.Linear(dim, dim_out) if self.widens and expand_proj else None
        self.ls1, self.ls2 = (
            LayerScale(dim_out, layer_scale) if layer_scale else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """[B, U, n, dim] -> [B, U, n or n / 4, dim_out].

        scales: drop path factors [B, 2] for the attention and the MLP; None drops nothing.
        """
        y = self.norm1(x)
        if self.proj is not None:
            widened = self.proj(y)
            # Under autocast `widened` is bf16. Without the cast, the residual stream would stay bf16.
            x = (max_pool(widened) if self.attn.pool else widened).to(x.dtype)
        elif self.widens:
            x = torch.cat([max_pool(x), mean_pool(x)] if self.attn.pool else [x, x], dim=-1)
        x = x + _scaled(self.ls1(self.attn(y)), scales, 0)
        return x + _scaled(self.ls2(self.mlp(self.norm2(x))), scales, 1)


def _scaled(x: Tensor, scales: Tensor | None, branch: int) -> Tensor:
    """Multiply x [B, U, n, C] by column `branch` of `scales` [B, 2]."""
    return x if scales is None else x * scales[:, branch, None, None, None].to(x.dtype)


class PatchEmbed(nn.Module):
    """Overlapping convolution from pixels to tokens, computed only for the kept mask units."""

    def __init__(self, video: bool, channels: int, dim: int) -> None:
        super().__init__()
        self.span, self.step = (3, FRAMES) if video else (1, 1)
        self.proj = conv(video, channels, dim, self.span, KERNEL)  # holds the parameters; see forward

    def forward(self, x: Tensor, keep: Tensor | None, units: Grid) -> Tensor:
        """[B, C, T, H, W], keep [B, k] or None -> [B, k or all units, 64, dim].

        The kernel's time axis is folded into the channels and the time steps into the batch, so that a
        two-dimensional convolution computes both images and clips.
        """
        batch = x.shape[0]
        x = F.pad(x, (0, 0, 0, 0, self.span // 2, 0)) if keep is None else self._hide(x, keep, units)
        x = x.unfold(2, self.span, self.step).permute(0, 2, 1, 5, 3, 4)  # [B, t, C, taps, H, W]
        weight = self.proj.weight.flatten(1, -3)
        if keep is None:
            x = F.conv2d(x.flatten(2, 3).flatten(0, 1), weight, self.proj.bias, STRIDE, PADDING)
            x = x.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)
            return unroll(x)
        side = UNIT * STRIDE
        x = x.unfold(4, side + HALO, side).unfold(5, side + HALO, side).permute(0, 1, 4, 5, 2, 3, 6, 7)
        x = gather_cells(x, keep).flatten(0, 1).flatten(1, 2)  # [B * k, C * taps, 35, 35]
        x = F.conv2d(x, weight, self.proj.bias, STRIDE)
        return unroll(x.permute(0, 2, 3, 1)[:, None]).reshape(batch, keep.shape[1], UNIT * UNIT, -1)

    def _hide(self, x: Tensor, keep: Tensor, units: Grid) -> Tensor:
        """Zero the masked pixels, which overlapping kernels would see, and pad the front of every axis."""
        mask = unit_mask(keep, math.prod(units)).view(-1, 1, *units)
        for axis, size in zip((2, 3, 4), x.shape[2:], strict=True):
            mask = mask.repeat_interleave(size // mask.shape[axis], dim=axis)
        return F.pad(x * mask, (HALO, 0, HALO, 0, self.span // 2, 0))


def unit_mask(keep: Tensor, units: int) -> Tensor:
    """Boolean mask [B, units], True for the units in `keep` [B, k]."""
    mask = torch.zeros(keep.shape[0], units, dtype=torch.bool, device=keep.device)
    return mask.scatter(1, keep, True)


def conv(video: bool, dim: int, dim_out: int, frames: int, side: int) -> nn.Conv2d | nn.Conv3d:
    """A convolution whose kernel has the shape of the released weights: 3-D for clips, 2-D for images."""
    if video:
        return nn.Conv3d(dim, dim_out, (frames, side, side))
    return nn.Conv2d(dim, dim_out, (side, side))


def init_uniform(conv: nn.Module, *names: str) -> None:
    """Initialize parameters as PyTorch initializes convolutions: uniform within 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(conv.get_parameter("weight")[0].numel())
    for name in names:
        nn.init.uniform_(conv.get_parameter(name), -bound, bound)


# ---- pixels to inputs
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


# ---- random draws from keys
# A counter-based hash of keys: the draws of a row depend only on its key. The CPU, CUDA and compiled graphs
# run the same integer operations and give the same numbers.
MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: maps neighboring counters to distant values
STREAM_DROP_PATH, STREAM_DROPOUT, STREAM_DECODE = range(1, 4)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers stored in int64; every output bit depends on every input bit.

    The constants are those of hash-prospector. The second one is 2**32 less, which does not change the low
    32 bits of the product: as a positive number the product would overflow int64.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK
    x = ((x ^ (x >> 15)) * (0xD35A2D97 - (1 << 32))) & MASK
    return x ^ (x >> 15)


def uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """Draws in [0, 1) for keys int64 [b]: float32 [b, count] in steps of 2**-24.

    Different streams are independent. A larger count appends draws and does not change the first ones.
    count: at most 50,000.
    """
    counter = torch.arange(1, count + 1, device=keys.device)
    # The factor GOLDEN is split because Triton computes products of indices in 32 bits.
    counters = ((counter * (GOLDEN >> 16)) << 16) + counter * (GOLDEN & 0xFFFF)
    low, high = keys[:, None] & MASK, (keys[:, None] >> 32) & MASK
    x = mix((counters + low) & MASK)
    x = mix((x + high + stream * GOLDEN) & MASK)
    return (x >> 8).float() * 2.0**-24


def draws(rows: Tensor, keys: Tensor | None, stream: int, count: int) -> Tensor:
    """Draws float32 [b, count] from the rows' keys, or from torch's generator if there are no keys."""
    if keys is None:
        return torch.rand(len(rows), count, device=rows.device)
    return uniform(keys, stream, count)


def dropout(x: Tensor, rate: float, keys: Tensor | None) -> Tensor:
    """Zero each element of x [b, C] with probability `rate` and divide the others by 1 - rate."""
    kept = draws(x, keys, STREAM_DROPOUT, x.shape[1]) >= rate
    return x * kept / (1 - rate)


def drop_path_scales(x: Tensor, rate: float, blocks: int, keys: Tensor | None) -> list[Tensor | None]:
    """Factors float [b, 2] of each block's two branches: 0 if a branch is dropped, else 1 / (1 - its rate).

    The rate increases linearly from 0 at the first block, which gets None, to `rate` at the last
    (arXiv 1603.09382).
    """
    keep = 1 - torch.linspace(0, rate, blocks, device=x.device).view(-1, 1)
    kept = draws(x, keys, STREAM_DROP_PATH, 2 * blocks).unflatten(1, (blocks, 2)) < keep
    return [None, *(kept / keep).unbind(1)[1:]]


def random_share(ids: Tensor, ratio: float, keys: Tensor | None) -> Tensor:
    """A random share `ratio` of the entries of each row of ids [b, n], in their order."""
    count = max(1, round(ids.shape[1] * ratio))
    order = draws(ids, keys, STREAM_DECODE, ids.shape[1]).argsort(dim=1, stable=True)
    return ids.gather(1, order[:, :count].sort(dim=1).values)
