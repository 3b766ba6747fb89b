"""Random draws from a counter-based hash of keys: the draws of a row depend only on its key.

The CPU, CUDA and compiled graphs run the same integer operations and give the same numbers.
"""

import torch
from torch import Tensor

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
