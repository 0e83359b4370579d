"""The masked products of `ops/lora.py` as Triton kernels: dropout masks exist only in registers.

Other kernels call `low_rank_tile` to add an adapter's part to a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.dropout_mask import threshold
from lorakit.ops.dropout_mask_triton import keep_tile
from lorakit.ops.kernel_launch import launch_kernel

# Chosen on an H100 (benchmarks/time_ops.py), for few rows and for many.
MANY_ROWS = 4096
DOWN = {
    "few": {"BLOCK_M": 16, "BLOCK_K": 256, "num_stages": 3},
    "many": {"BLOCK_M": 64, "BLOCK_K": 64, "num_stages": 3},
}
INPUT_GRAD = {
    "few": {"BLOCK_M": 32, "BLOCK_K": 128, "num_stages": 1},
    "many": {"BLOCK_M": 64, "BLOCK_K": 128, "num_stages": 1},
}
A_GRAD = {"BLOCK_M": 64, "BLOCK_K": 128, "num_stages": 3}
A_GRAD_SPLITS = 4


def _for(rows: int) -> str:
    return "many" if rows >= MANY_ROWS else "few"


def lora_down_triton(x: Tensor, a: Tensor, keys: Tensor, p: float) -> Tensor:
    """See `lora.lora_down`."""
    rows, width = x.shape
    modules = len(keys)
    rank = a.shape[0] // modules
    out = torch.empty(rows, modules * rank, dtype=x.dtype, device=x.device)
    launch_kernel(
        _down_kernel, DOWN[_for(rows)], lambda s: (triton.cdiv(rows, s["BLOCK_M"]), modules),
        x, a, keys, out, rows, width, x.stride(0), threshold(p),
        RANK=rank, BLOCK_R=matrix_block(rank),
    )  # fmt: skip
    return out


def lora_input_grad_triton_(dx: Tensor, ds: Tensor, a: Tensor, keys: Tensor, p: float) -> Tensor:
    """See `lora.lora_input_grad_`."""
    rows, width = dx.shape
    modules = len(keys)
    rank = a.shape[0] // modules
    launch_kernel(
        _input_grad_kernel, INPUT_GRAD[_for(rows)],
        lambda s: (triton.cdiv(rows, s["BLOCK_M"]), triton.cdiv(width, s["BLOCK_K"])),
        dx, ds, a, keys, rows, width, dx.stride(0), ds.stride(0), threshold(p),
        MODULES=modules, RANK=rank, BLOCK_R=matrix_block(rank),
    )  # fmt: skip
    return dx


def lora_a_grad_triton(
    ds: Tensor,
    x: Tensor,
    keys: Tensor,
    p: float,
    factor: float = 1.0,
    into: Tensor | None = None,
) -> Tensor:
    """See `lora.lora_a_grad`. Partial sums are added in a fixed order."""
    rows, width = x.shape
    modules = len(keys)
    rank = ds.shape[1] // modules
    partial = torch.empty(
        A_GRAD_SPLITS, modules * rank, width, dtype=torch.float32, device=x.device
    )
    block = A_GRAD["BLOCK_M"]
    chunk = triton.cdiv(triton.cdiv(rows, A_GRAD_SPLITS), block) * block
    launch_kernel(
        _a_grad_kernel, A_GRAD,
        lambda s: (triton.cdiv(width, s["BLOCK_K"]), modules, A_GRAD_SPLITS),
        ds, x, keys, partial, rows, width, ds.stride(0), x.stride(0), chunk, threshold(p),
        modules * rank, RANK=rank, BLOCK_R=matrix_block(rank),
    )  # fmt: skip
    out = torch.empty_like(partial[0]) if into is None else into
    size = out.numel()
    _reduce_kernel[(triton.cdiv(size, 1024),)](
        partial, out, size, factor, ADD=into is not None, SPLITS=A_GRAD_SPLITS, BLOCK=1024
    )
    return out


def matrix_block(size: int) -> int:
    """Pad a rank or width for the matrix units: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


@triton.jit(do_not_specialize=["threshold"])
def _down_kernel(  # type: ignore[no-untyped-def]
    x, a, keys, out, rows, width, x_stride, threshold,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    module = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        offsets = row.to(tl.int64)[:, None] * x_stride + column[None, :]
        tile = tl.load(x + offsets, mask=inside, other=0.0)
        keep = keep_tile(row, column, width, keys, module, threshold)
        tile = tl.where(keep, tile, 0.0).to(tile.dtype)
        factor = tl.load(
            a + (module * RANK + rank)[None, :] * width + column[:, None],
            mask=(rank < RANK)[None, :] & (column < width)[:, None],
            other=0.0,
        )
        total = tl.dot(tile, factor, total, input_precision="ieee")
    modules = tl.num_programs(1)
    offsets = row.to(tl.int64)[:, None] * (modules * RANK) + module * RANK + rank[None, :]
    inside = (row < rows)[:, None] & (rank < RANK)[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _input_grad_kernel(  # type: ignore[no-untyped-def]
    dx, ds, a, keys, rows, width, dx_stride, ds_stride, threshold,
    MODULES: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    offsets = row.to(tl.int64)[:, None] * dx_stride + column[None, :]
    total = tl.load(dx + offsets, mask=inside, other=0.0).to(tl.float32)
    for module in tl.static_range(MODULES):
        total = masked_low_rank_tile(
            total, ds, a, keys, row, column, rows, width, ds_stride, threshold,
            module, True, RANK, BLOCK_R,
        )  # fmt: skip
    tl.store(dx + offsets, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _a_grad_kernel(  # type: ignore[no-untyped-def]
    ds, x, keys, partial, rows, width, ds_stride, x_stride, chunk, threshold, total_rank,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    module = tl.program_id(1)
    split = tl.program_id(2)
    rank = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    end = tl.minimum(rows, (split + 1) * chunk)
    for start in range(split * chunk, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (column < width)[None, :]
        offsets = row.to(tl.int64)[:, None] * x_stride + column[None, :]
        tile = tl.load(x + offsets, mask=inside, other=0.0)
        keep = keep_tile(row, column, width, keys, module, threshold)
        tile = tl.where(keep, tile, 0.0).to(tile.dtype)
        left = tl.load(
            ds + row.to(tl.int64)[None, :] * ds_stride + module * RANK + rank[:, None],
            mask=(row < end)[None, :] & (rank < RANK)[:, None],
            other=0.0,
        )
        total = tl.dot(left, tile, total, input_precision="ieee")
    offsets = (split * total_rank + module * RANK + rank)[:, None] * width + column[None, :]
    tl.store(partial + offsets, total, mask=(rank < RANK)[:, None] & (column < width)[None, :])


@triton.jit
def _reduce_kernel(  # type: ignore[no-untyped-def]
    partial, out, size, factor, ADD: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + offsets, mask=inside, other=0.0)
    total *= factor
    if ADD:
        total += tl.load(out + offsets, mask=inside, other=0.0)
    tl.store(out + offsets, total, mask=inside)


@triton.jit
def low_rank_tile(  # type: ignore[no-untyped-def]
    tile, s, b, row, column, rows, end, s_stride,
    SLOT: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`tile` [rows, columns] float32 plus S_slot B^T; `column` are rows of b, below `end`."""
    if SLOT >= 0:
        rank = tl.arange(0, BLOCK_R)
        left = tl.load(
            s + row.to(tl.int64)[:, None] * s_stride + SLOT * RANK + rank[None, :],
            mask=(row < rows)[:, None] & (rank < RANK)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + column[None, :] * RANK + rank[:, None],
            mask=(column < end)[None, :] & (rank < RANK)[:, None],
            other=0.0,
        )
        tile = tl.dot(left, right, tile, input_precision="ieee")
    return tile


@triton.jit
def masked_low_rank_tile(  # type: ignore[no-untyped-def]
    tile, ds, a, keys, row, column, rows, width, ds_stride, threshold,
    module, MASKED: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`tile` [rows, columns] float32 plus m * (dS A) of one module; m is 1 unless MASKED."""
    rank = tl.arange(0, BLOCK_R)
    left = tl.load(
        ds + row.to(tl.int64)[:, None] * ds_stride + module * RANK + rank[None, :],
        mask=(row < rows)[:, None] & (rank < RANK)[None, :],
        other=0.0,
    )
    right = tl.load(
        a + (module * RANK + rank)[:, None] * width + column[None, :],
        mask=(rank < RANK)[:, None] & (column < width)[None, :],
        other=0.0,
    )
    if MASKED:
        part = tl.dot(left, right, input_precision="ieee")
        keep = keep_tile(row, column, width, keys, module, threshold)
        return tile + tl.where(keep, part, 0.0)
    return tl.dot(left, right, tile, input_precision="ieee")
