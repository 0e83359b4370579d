"""The keep decision of `ops/dropout_mask.py` inside a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.dropout_mask import threshold

BLOCK_M, BLOCK_K = 16, 256


def masked_triton(x: Tensor, key: Tensor, p: float) -> Tensor:
    """x [M, K] with 0 at elements that the mask of `key` [2] drops, contiguous."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, BLOCK_M), triton.cdiv(width, BLOCK_K))
    _mask_kernel[grid](
        x, key, out, rows, width, x.stride(0), threshold(p), BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K
    )
    return out


@triton.jit(do_not_specialize=["threshold"])
def _mask_kernel(  # type: ignore[no-untyped-def]
    x, key, out, rows, width, x_stride, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    row_index = row.to(tl.int64)[:, None]
    tile = tl.load(x + row_index * x_stride + column[None, :], mask=inside, other=0.0)
    keep = keep_tile(row, column, width, key, 0, threshold)
    tl.store(out + row_index * width + column[None, :], tl.where(keep, tile, 0.0), mask=inside)


@triton.jit
def keep_tile(row, column, width, keys, index, threshold):  # type: ignore[no-untyped-def]
    """bool [rows, columns] of mask `index`: `dropout_mask.keep_mask` at these rows and columns."""
    first = tl.load(keys + 2 * index).to(tl.uint32)
    second = tl.load(keys + 2 * index + 1).to(tl.uint32)
    down = (row.to(tl.uint32) * width.to(tl.uint32) + first) * 0x7FEB352D
    across = column.to(tl.uint32) * 0x7FEB352D
    h = down[:, None] + across[None, :]
    h = h ^ (h >> 15)
    h = (h ^ second) * 0x846CA68B
    return h >= threshold.to(tl.uint32)
