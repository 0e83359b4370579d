"""Positions and keys enter; the keep decision of `hash_mask.py` leaves, inside a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_tile(row, column, width, keys, number, threshold):  # type: ignore[no-untyped-def]
    """bool [rows, columns] of mask `number`: as `hash_mask.keep_mask` at these rows and columns."""
    first = tl.load(keys + 2 * number).to(tl.uint32)
    second = tl.load(keys + 2 * number + 1).to(tl.uint32)
    down = (row.to(tl.uint32) * width.to(tl.uint32) + first) * 0x7FEB352D
    across = column.to(tl.uint32) * 0x7FEB352D
    h = down[:, None] + across[None, :]
    h = h ^ (h >> 15)
    h = (h ^ second) * 0x846CA68B
    return h >= threshold.to(tl.uint32)
