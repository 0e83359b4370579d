"""The products of `lora_output.py` as Triton kernels: dy is read once for both gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.kernel_launch import launch_kernel
from lorakit.ops.lora import Update
from lorakit.ops.lora_triton import low_rank_tile, matrix_block

# Chosen on an H100 (benchmarks/time_ops.py). A program processes BLOCK_M rows of CHUNK columns.
GRADS = {"BLOCK_M": 256, "BLOCK_N": 64, "CHUNK": 512, "num_warps": 8, "num_stages": 3}
SUM = {"BLOCK": 512, "UNROLL": 8}
ADD = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}
MODULES = 3


def lora_add_triton(start: Tensor, update: Update, out: Tensor | None = None) -> Tensor:
    """See `lora_output.lora_add`."""
    rows, width = start.shape
    out = torch.empty_like(start) if out is None else out
    launch_kernel(
        _add_kernel, ADD,
        lambda s: (triton.cdiv(rows, s["BLOCK_M"]), triton.cdiv(width, s["BLOCK_N"])),
        start, out, update.s, update.b, rows, width,
        start.stride(0), out.stride(0), update.s.stride(0),
        RANK=update.rank, BLOCK_R=matrix_block(update.rank),
    )  # fmt: skip
    return out


def lora_output_grads_triton(
    dy: Tensor, update: Update, columns: Sequence[slice], into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `lora_output.lora_output_grads`. Partial sums are added in a fixed order."""
    rows, rank, count = dy.shape[0], update.rank, len(columns)
    unused = MODULES - count
    widths = [c.stop - c.start for c in columns] + [0] * unused
    starts = [c.start for c in columns] + [0] * unused
    chunks = [triton.cdiv(w, GRADS["CHUNK"]) for w in widths]
    splits = triton.cdiv(rows, GRADS["BLOCK_M"])
    of_s = torch.empty(sum(chunks), rows, rank, dtype=torch.float32, device=dy.device)
    of_b = torch.empty(splits, sum(widths), rank, dtype=torch.float32, device=dy.device)
    shape = {"RANK": rank, "BLOCK_R": matrix_block(rank)}
    launch_kernel(
        _grads_kernel, GRADS, lambda _: (sum(chunks), splits),
        dy, update.s, update.b, of_s, of_b, rows, dy.stride(0), update.s.stride(0),
        *starts, *widths, fixed=("BLOCK_M",), **shape,
    )  # fmt: skip
    ds = torch.empty(rows, count * rank, dtype=dy.dtype, device=dy.device)
    db = torch.empty_like(of_b[0]) if into is None else into
    tiles = triton.cdiv(rows * rank, SUM["BLOCK"])
    _sum_kernel[(count * tiles + triton.cdiv(db.numel(), SUM["BLOCK"]),)](
        of_s, of_b, ds, db, rows, splits, db.numel(), tiles, count, *chunks,
        ADD=into is not None, RANK=rank, **SUM,
    )  # fmt: skip
    return ds, db


@triton.jit
def _add_kernel(  # type: ignore[no-untyped-def]
    start, out, s, b, rows, width, start_stride, out_stride, s_stride,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    offsets = row.to(tl.int64)[:, None] * start_stride + column[None, :]
    tile = tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32)
    tile = low_rank_tile(tile, s, b, row, column, rows, width, s_stride, 0, RANK, BLOCK_R)
    offsets = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out + offsets, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grads_kernel(  # type: ignore[no-untyped-def]
    dy, s, b, of_s, of_b, rows, dy_stride, s_stride,
    start0, start1, start2, width0, width1, width2,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk, split = tl.program_id(0), tl.program_id(1)
    end0 = tl.cdiv(width0, CHUNK)
    end1 = end0 + tl.cdiv(width1, CHUNK)
    module, first, start, width, before = 0, 0, start0, width0, 0
    if chunk >= end1:
        module, first, start, width, before = 2, end1, start2, width2, width0 + width1
    elif chunk >= end0:
        module, first, start, width, before = 1, end0, start1, width1, width0
    rank = tl.arange(0, BLOCK_R)
    row = split * BLOCK_M + tl.arange(0, BLOCK_M)
    row_index = row.to(tl.int64)
    narrow = (row < rows)[:, None] & (rank < RANK)[None, :]
    right = tl.load(
        s + row_index[:, None] * s_stride + module * RANK + rank[None, :], mask=narrow, other=0.0
    )
    part = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    of_b += (split * (width0 + width1 + width2) + before) * RANK
    for step in range(0, CHUNK, BLOCK_N):
        module_column = (chunk - first) * CHUNK + step + tl.arange(0, BLOCK_N)
        tile = tl.load(
            dy + row_index[:, None] * dy_stride + (start + module_column)[None, :],
            mask=(row < rows)[:, None] & (module_column < width)[None, :],
            other=0.0,
        )
        inside = (module_column < width)[:, None] & (rank < RANK)[None, :]
        factor = tl.load(
            b + (start + module_column)[:, None] * RANK + rank[None, :], mask=inside, other=0.0
        )
        part = tl.dot(tile, factor, part, input_precision="ieee")
        total = tl.dot(tl.trans(tile), right, input_precision="ieee")
        tl.store(of_b + module_column[:, None] * RANK + rank[None, :], total, mask=inside)
    offsets = (chunk.to(tl.int64) * rows + row_index)[:, None] * RANK + rank[None, :]
    tl.store(of_s + offsets, part, mask=narrow)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    of_s, of_b, ds, db, rows, splits, b_size, tiles, count, chunks0, chunks1, chunks2,
    ADD: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if program < count * tiles:
        module = program // tiles
        offsets = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
        size = rows * RANK
        first = tl.where(module == 0, 0, tl.where(module == 1, chunks0, chunks0 + chunks1))
        chunks = tl.where(module == 0, chunks0, tl.where(module == 1, chunks1, chunks2))
        part = of_s + first.to(tl.int64) * size + offsets
        for _ in tl.range(0, chunks, loop_unroll_factor=UNROLL):
            total += tl.load(part, mask=offsets < size, other=0.0)
            part += size
        target = (offsets // RANK) * (count * RANK) + module * RANK + offsets % RANK
        tl.store(ds + target, total.to(ds.dtype.element_ty), mask=offsets < size)
    else:
        offsets = (program - count * tiles) * BLOCK + tl.arange(0, BLOCK)
        part = of_b + offsets
        for _ in tl.range(0, splits, loop_unroll_factor=UNROLL):
            total += tl.load(part, mask=offsets < b_size, other=0.0)
            part += b_size
        if ADD:
            total += tl.load(db + offsets, mask=offsets < b_size, other=0.0)
        tl.store(db + offsets, total, mask=offsets < b_size)
