"""Positions and keys enter; the keep decision of `hash_mask.py` leaves, inside a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keeps(index, first, second, threshold):  # type: ignore[no-untyped-def]
    """`index` uint32, keys uint32, `threshold` uint32 -> bool, as `hash_mask.keep_mask`."""
    h = index ^ first
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ second
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    h = h ^ (h >> 16)
    return h >= threshold


@triton.jit
def load_key(keys, number):  # type: ignore[no-untyped-def]
    """The two keys of mask `number` as uint32 scalars."""
    first = tl.load(keys + 2 * number).to(tl.uint32)
    second = tl.load(keys + 2 * number + 1).to(tl.uint32)
    return first, second
