"""Token order and mask-unit geometry. No other file depends on the order of tokens in memory.

A token is 4x4 pixels of a frame. A mask unit is 8x8 tokens, or 32x32 pixels: MAE masks whole units, and
attention in the first stages stays inside a unit. In clips, a token spans 2 frames and a unit is one token
deep, so a unit is 2 frames x 32 x 32 pixels. An image is treated as a clip with one time step.

Inside a unit, tokens are in pooling order, not row by row. A token's row and column in its unit have 3 bits
each, y3 y2 y1 and x3 x2 x1. The first 2x2 pooling merges over bits y1 and x1, the last over y3 and x3. The
order in memory is (y1 x1)(y2 x2)(y3 x3), from the slowest index to the fastest:

    a unit's first rows, with positions in memory        input of the first pooling, [4, 16, C]

      0  16   4  20 |  1  17   5  21                        0   1   2   3   4   5 ...
     32  48  36  52 | 33  49  37  53                       16  17  18  19  20  21
      8  24  12  28 |  9  25  13  29                       32  33  34  35  36  37
     40  56  44  60 | 41  57  45  61                       48  49  50  51  52  53
     ---------------+---------------                        |
      2  18   6  22 |  3  19   7  23                        a column is a 2x2 square of the unit

Pooling is therefore the contiguous `view(4, n / 4, C).max(0)`, and its result is again in pooling order.
Units are in (time, row, column) order. In all models x is [batch, units, tokens per unit, channels].
Attention inside units folds the units into the batch, global attention joins them into one sequence, and
masked units are dropped by a gather along axis 1.
"""

import torch
from torch import Tensor

from pipelines.errors import UserError

POOLS = 3  # 2x2 poolings that reduce a mask unit to one token
UNIT = 2**POOLS  # tokens along a mask unit's side
STRIDE = 4  # pixels along a token's side
FRAMES = 2  # frames in a clip's token

Grid = tuple[int, int, int]  # time steps, rows, columns


def unit_grid(input_size: tuple[int, ...]) -> Grid:
    """Mask units per axis of an image (H, W) or a clip (T, H, W), in pixels and frames.

    Raises UserError with the nearest valid sizes if a side is not a multiple of 32 or T is odd.
    """
    if len(input_size) not in (2, 3) or min(input_size) < 1:
        raise UserError(f"input_size is {input_size}; give (H, W) for images or (T, H, W) for clips")
    steps = (FRAMES, UNIT * STRIDE, UNIT * STRIDE)[-len(input_size) :]
    if any(size % step for size, step in zip(input_size, steps, strict=True)):
        raise UserError(_size_advice(input_size, steps))
    t, h, w = (1, *(size // step for size, step in zip(input_size, steps, strict=True)))[-3:]
    return t, h, w


def _size_advice(input_size: tuple[int, ...], steps: tuple[int, ...]) -> str:
    """A message with the nearest valid sizes below and above `input_size`."""
    below = [max(size // step, 1) * step for size, step in zip(input_size, steps, strict=True)]
    above = [-(-size // step) * step for size, step in zip(input_size, steps, strict=True)]
    below, above, given = ("x".join(map(str, sizes)) for sizes in (below, above, input_size))
    nearest = above if below == above else f"{below} or {above}"
    rule = "sides must be multiples of 32 pixels" + (" and frames even" if len(steps) == 3 else "")
    return f"input size {given} cannot be cut into mask units ({rule}); use {nearest}"


def unroll(x: Tensor, pools: int = POOLS) -> Tensor:
    """Reorder tokens from spatial to pooling order: [B, t, h, w, C] -> [B, units, 4**pools, C]."""
    batch, t, h, w, channels = x.shape
    bits = [2] * pools
    x = x.reshape(batch, t, h >> pools, *bits, w >> pools, *bits, channels)
    rows = range(2 + pools, 2, -1)  # finest first
    columns = range(3 + 2 * pools, 3 + pools, -1)
    inside = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    return x.permute(0, 1, 2, 3 + pools, *inside, -1).reshape(batch, -1, 4**pools, channels)


def reroll(x: Tensor, units: Grid) -> Tensor:
    """Undo `unroll`, at any pooling level: [B, units, 4**k, C] -> [B, t, h, w, C]."""
    batch, _, tokens, channels = x.shape
    pools = tokens.bit_length() // 2
    t, h, w = units
    x = x.reshape(batch, t, h, w, *[2] * (2 * pools), channels)
    rows = range(2 + 2 * pools, 3, -2)  # coarsest first
    columns = range(3 + 2 * pools, 4, -2)
    return x.permute(0, 1, 2, *rows, 3, *columns, -1).reshape(batch, t, h << pools, w << pools, channels)


def max_pool(x: Tensor) -> Tensor:
    """2x2 max pooling in pooling order: [B, units, n, C] -> [B, units, n / 4, C]."""
    batch, units, tokens, channels = x.shape
    return x.view(batch, units, 4, tokens // 4, channels).max(dim=2).values


def mean_pool(x: Tensor) -> Tensor:
    """2x2 mean pooling in pooling order: [B, units, n, C] -> [B, units, n / 4, C]."""
    return x.unflatten(2, (4, -1)).mean(dim=2)


def gather_cells(cells: Tensor, ids: Tensor) -> Tensor:
    """Gather cells of a spatial grid by flat index: [B, t, h, w, ...] and [B, k] -> [B, k, ...].

    `cells` may be a strided view; only the gathered cells are copied.
    """
    _, _, h, w = cells.shape[:4]
    batch = torch.arange(len(ids), device=ids.device)[:, None]
    return cells[batch, ids // (h * w), ids // w % h, ids % w]
