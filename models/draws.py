"""Random draws that a counter-based hash makes from keys, so that a row's draws depend on its key alone.

The same integer operations run on the CPU, on CUDA and in compiled graphs: all give the same numbers.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: neighbouring counters get distant places
STREAM_DROP_PATH, STREAM_DROPOUT, STREAM_DECODE = range(1, 4)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64: every input bit reaches every output bit.

    The constants are hash-prospector's. The second one is written as a negative number, so that no product
    leaves 64 bits, which signed integers must not do in compiled code; its low 32 bits are the same.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK
    x = ((x ^ (x >> 15)) * (0xD35A2D97 - (1 << 32))) & MASK
    return x ^ (x >> 15)


def uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """Draws in [0, 1), float32 [b, count] in steps of 2**-24, of each key int64 [b].

    Draws of two streams are independent, and those of a smaller count are the first ones of a larger count.
    count: at most 50,000.
    """
    counter = torch.arange(1, count + 1, device=keys.device)
    # counter * GOLDEN in two parts: Triton computes products of indices in 32 bits.
    counters = ((counter * (GOLDEN >> 16)) << 16) + counter * (GOLDEN & 0xFFFF)
    low, high = keys[:, None] & MASK, (keys[:, None] >> 32) & MASK
    x = mix((counters + low) & MASK)
    x = mix((x + high + stream * GOLDEN) & MASK)
    return (x >> 8).float() * 2.0**-24


def draws(rows: Tensor, keys: Tensor | None, stream: int, count: int) -> Tensor:
    """Draws float32 [b, count] of the rows' keys; without keys from torch's generator on their device."""
    if keys is None:
        return torch.rand(len(rows), count, device=rows.device)
    return uniform(keys, stream, count)


def dropout(x: Tensor, rate: float, keys: Tensor | None) -> Tensor:
    """Zero a share `rate` of the elements of x [b, C] and divide the others by 1 - rate."""
    kept = draws(x, keys, STREAM_DROPOUT, x.shape[1]) >= rate
    return x * kept / (1 - rate)


def drop_path_scales(x: Tensor, rate: float, blocks: int, keys: Tensor | None) -> list[Tensor | None]:
    """Factors float [b, 2] of every block's two branches: 0 for a dropped branch, else 1 / (1 - its rate).

    Rates rise linearly from 0 at the first block, which gets None, to `rate` at the last (arXiv 1603.09382).
    """
    keep = 1 - torch.linspace(0, rate, blocks, device=x.device).view(-1, 1)
    kept = draws(x, keys, STREAM_DROP_PATH, 2 * blocks).unflatten(1, (blocks, 2)) < keep
    return [None, *(kept / keep).unbind(1)[1:]]


def random_share(ids: Tensor, ratio: float, keys: Tensor | None) -> Tensor:
    """A random share of the entries of each row of ids [b, n], in their order."""
    count = max(1, round(ids.shape[1] * ratio))
    order = draws(ids, keys, STREAM_DECODE, ids.shape[1]).argsort(dim=1, stable=True)
    return ids.gather(1, order[:, :count].sort(dim=1).values)
