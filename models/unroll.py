"""Token order and mask-unit geometry; no other file knows how tokens are laid out.

A frame is cut into 4x4-pixel tokens, and 8x8 tokens make one mask unit: 32x32 pixels, the square that MAE
masks and that early attention stays inside. Clips add time: one token spans 2 frames, and a unit is one
token deep, so a unit of a clip is 2 frames x 32 x 32 pixels. Images count as clips of one time step.

Inside a unit, tokens lie in pooling order rather than row by row. Each of the three 2x2 poolings splits
both axes in two: bit 1 of a row or column (y1, x1) is what the first pooling merges, bit 3 what the last
one does. The order is (y1 x1)(y2 x2)(y3 x3), finest pair slowest:

    a unit's first rows, numbered by place in memory     what the first pooling sees, [4, 16, C]

      0  16   4  20 |  1  17   5  21                        0   1   2   3   4   5 ...
     32  48  36  52 | 33  49  37  53                       16  17  18  19  20  21
      8  24  12  28 |  9  25  13  29                       32  33  34  35  36  37
     40  56  44  60 | 41  57  45  61                       48  49  50  51  52  53
     ---------------+---------------                        |
      2  18   6  22 |  3  19   7  23                        a column is a 2x2 square of the unit

so pooling is `view(4, n / 4, C).max(0)`, contiguous, and what is left is again in pooling order. Units lie
side by side, in (time, row, column) order: x is [batch, units, tokens per unit, channels] everywhere.
Attention inside units folds units into the batch, global attention joins them into one sequence, and
dropping masked units is a gather along axis 1.
"""

import torch
from torch import Tensor

from models.errors import ModelError

POOLS = 3  # 2x2 poolings that a mask unit can take
UNIT = 2**POOLS  # tokens along a mask unit's side
STRIDE = 4  # pixels along a token's side
FRAMES = 2  # frames in a clip's token

Grid = tuple[int, int, int]  # time steps, rows, columns


def unit_grid(input_size: tuple[int, ...]) -> Grid:
    """Count the mask units of an input of (H, W) pixels or (T, H, W) frames and pixels, per axis.

    Raises ModelError, naming the nearest sizes that work, unless sides divide by 32 and frames by 2.
    """
    steps = (UNIT * STRIDE,) * 2 if len(input_size) == 2 else (FRAMES, UNIT * STRIDE, UNIT * STRIDE)
    if len(input_size) not in (2, 3) or min(input_size) < 1:
        raise ModelError(f"input_size is (H, W) for images or (T, H, W) for clips, not {input_size}")
    if any(size % step for size, step in zip(input_size, steps, strict=True)):
        raise ModelError(_size_advice(input_size, steps))
    t, h, w = (1, *input_size)[-3:] if len(input_size) == 2 else input_size
    return (t if len(input_size) == 2 else t // FRAMES, h // (UNIT * STRIDE), w // (UNIT * STRIDE))


def _size_advice(input_size: tuple[int, ...], steps: tuple[int, ...]) -> str:
    """Say which sizes next to `input_size` work."""
    below = [max(size // step, 1) * step for size, step in zip(input_size, steps, strict=True)]
    above = [-(-size // step) * step for size, step in zip(input_size, steps, strict=True)]
    below, above, given = ("x".join(map(str, sizes)) for sizes in (below, above, input_size))
    nearest = above if below == above else f"{below} and {above}"
    rule = "sides must be multiples of 32 pixels" + (" and frames even" if len(steps) == 3 else "")
    return f"input size {given} cannot be cut into mask units ({rule}); the nearest that can: {nearest}"


def unroll(x: Tensor, pools: int = POOLS) -> Tensor:
    """Bring tokens from spatial into pooling order: [B, t, h, w, C] -> [B, units, 4**pools, C]."""
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


def take(cells: Tensor, ids: Tensor) -> Tensor:
    """Gather cells of a spatial grid by flat index: [B, t, h, w, ...] and [B, k] -> [B, k, ...].

    `cells` may be a strided view; only the cells asked for are copied.
    """
    _, _, h, w = cells.shape[:4]
    batch = torch.arange(len(ids), device=ids.device)[:, None]
    return cells[batch, ids // (h * w), ids // w % h, ids % w]
