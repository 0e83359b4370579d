"""Dropout masks that are recomputed from two 32-bit keys instead of stored.

Each element's decision is a keyed integer hash of its position i, so forward and backward draw the
same mask from eight bytes: two multiplications with an xorshift and the second key between them,

    h = (i + k1) * c1;  h ^= h >> 15;  h = (h ^ k2) * c2;  keep = h >= p * 2^32     (modulo 2^32)

The constants are those of Wellons' lowbias32; its outer shifts would mix low bits, but the
comparison depends on the high ones. (i + k1) * c1 is a term of the row plus one of the column, so a
kernel spends six instructions per element, where ten Philox rounds take about fifteen.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B
_LOW = 0xFFFFFFFF


def draw_keys(count: int, device: torch.device) -> Tensor:
    """Draw keys [count, 2] int32 from torch's generator of `device`, one pair per mask.

    The generator's state is saved with every checkpoint, so a resumed run draws the same masks.
    """
    return torch.randint(0, 2**31 - 1, (count, 2), dtype=torch.int32, device=device)


def threshold(p: float) -> int:
    """Number of the 2^32 hash values that drop an element."""
    return min(round(p * 2**32), _LOW)


def keep_mask(key: Tensor, rows: int, columns: int, p: float, start: int = 0) -> Tensor:
    """bool [rows, columns]: True with probability 1 - p; `key` [2] int32; rows from `start` on."""
    begin, end = start * columns, (start + rows) * columns
    index = torch.arange(begin, end, dtype=torch.int64, device=key.device)
    first, second = key.to(torch.int64).unbind()
    h = ((index + first) & _LOW) * MULTIPLIER_1 & _LOW
    h = h ^ (h >> 15)
    h = (h ^ second) * MULTIPLIER_2 & _LOW
    return (h >= threshold(p)).view(rows, columns)
