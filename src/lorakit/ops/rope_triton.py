"""The rotation of `rope.py` as a Triton kernel: one token per program, heads in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.kernel_launch import launch_kernel
from lorakit.ops.lora import Update
from lorakit.ops.lora_triton import low_rank_tile, matrix_block

BLOCK_H = 8
ROTATE = {"BLOCK_M": 32, "num_warps": 8}


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """See `rope.rope`."""
    batch, length, heads, width = x.shape
    cos_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    grid = (batch * length, triton.cdiv(heads, BLOCK_H))
    _rope_kernel[grid](
        x, cos, sin, out, length, heads,
        x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
        cos_batch, cos.stride(1),
        HALF=width // 2, BLOCK_D=triton.next_power_of_2(width // 2), BLOCK_H=BLOCK_H,
        num_warps=2,
    )  # fmt: skip
    return out


def rotate_qkv_triton_(
    qkv: Tensor,
    heads: tuple[int, int, int],
    width: int,
    angles: tuple[Tensor, Tensor] | None,
    update: Update | None,
) -> Tensor:
    """See `rope.rotate_qkv_`."""
    rows, half = qkv.shape[0], width // 2
    of_s, b, slots = (update.s, update.b, update.slots) if update else (qkv, qkv, (-1, -1, -1))
    cos, sin = angles or (qkv, qkv)
    length = cos.shape[1] if angles else 1
    rank = update.rank if update else 1
    launch_kernel(
        _rotate_kernel, ROTATE, lambda s: (triton.cdiv(rows, s["BLOCK_M"]), sum(heads)),
        qkv, of_s, b, cos, sin, rows, length, qkv.stride(0), of_s.stride(0),
        cos.stride(0) if angles and cos.shape[0] > 1 else 0, cos.stride(1) if angles else 0,
        Q=heads[0], K=heads[1], SLOT_Q=slots[0], SLOT_K=slots[1], SLOT_V=slots[2],
        RANK=rank, BLOCK_R=matrix_block(rank),
        HALF=half, BLOCK_D=matrix_block(half), ROTATES=angles is not None,
    )  # fmt: skip
    return qkv


def unrotate_qkv_triton(
    dq: Tensor, dk: Tensor, dv: Tensor, angles: tuple[Tensor, Tensor] | None
) -> Tensor:
    """See `rope.unrotate_qkv`."""
    batch, length, _, width = dq.shape
    heads = [t.shape[2] for t in (dq, dk, dv)]
    rows = batch * length
    dqkv = torch.empty(rows, sum(heads) * width, dtype=dq.dtype, device=dq.device)
    cos, sin = angles or (dq, dq)
    strides = [stride for t in (dq, dk, dv) for stride in t.stride()[:3]]
    launch_kernel(
        _unrotate_kernel, ROTATE, lambda s: (triton.cdiv(rows, s["BLOCK_M"]), sum(heads)),
        dq, dk, dv, dqkv, cos, sin, rows, length, *strides,
        cos.stride(0) if angles and cos.shape[0] > 1 else 0, cos.stride(1) if angles else 0,
        Q=heads[0], K=heads[1], V=heads[2], HALF=width // 2, BLOCK_D=matrix_block(width // 2),
        ROTATES=angles is not None,
    )  # fmt: skip
    return dqkv


@triton.jit
def _add_low_rank(  # type: ignore[no-untyped-def]
    first, second, s, b, row, head, rows, s_stride,
    SLOT: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the adapter's part to both halves of a head; a head is 2 * HALF rows of b."""
    column = head * 2 * HALF + tl.arange(0, BLOCK_D)
    end = head * 2 * HALF + HALF
    first = low_rank_tile(first, s, b, row, column, rows, end, s_stride, SLOT, RANK, BLOCK_R)
    column, end = column + HALF, end + HALF
    second = low_rank_tile(second, s, b, row, column, rows, end, s_stride, SLOT, RANK, BLOCK_R)
    return first, second


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    qkv, s, b, cos, sin, rows, length, stride, s_stride, cos_batch, cos_row,
    Q: tl.constexpr, K: tl.constexpr, SLOT_Q: tl.constexpr, SLOT_K: tl.constexpr,
    SLOT_V: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, ROTATES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < HALF)[None, :]
    offsets = row.to(tl.int64)[:, None] * stride + (head * 2 * HALF + d)[None, :]
    first = tl.load(qkv + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    if head < Q:
        first, second = _add_low_rank(
            first, second, s, b, row, head, rows, s_stride, SLOT_Q, RANK, BLOCK_R, HALF, BLOCK_D
        )
    elif head < Q + K:
        first, second = _add_low_rank(
            first, second, s, b, row, head, rows, s_stride, SLOT_K, RANK, BLOCK_R, HALF, BLOCK_D
        )
    else:
        first, second = _add_low_rank(
            first, second, s, b, row, head, rows, s_stride, SLOT_V, RANK, BLOCK_R, HALF, BLOCK_D
        )
    if ROTATES and head < Q + K:
        angle = (
            (row // length)[:, None] * cos_batch + (row % length)[:, None] * cos_row + d[None, :]
        )
        c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        sn = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        rotated = first * c - second * sn
        second = second * c + first * sn
        first = rotated
    dtype = qkv.dtype.element_ty
    tl.store(qkv + offsets, first.to(dtype), mask=inside)
    tl.store(qkv + offsets + HALF, second.to(dtype), mask=inside)


@triton.jit
def _unrotate_kernel(  # type: ignore[no-untyped-def]
    dq, dk, dv, dqkv, cos, sin, rows, length,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, cos_batch, cos_row,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, ROTATES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < HALF)[None, :]
    b, t = (row // length).to(tl.int64)[:, None], (row % length).to(tl.int64)[:, None]
    if head < Q:
        source = dq + b * qb + t * qt + head * qh + d[None, :]
    elif head < Q + K:
        source = dk + b * kb + t * kt + (head - Q) * kh + d[None, :]
    else:
        source = dv + b * vb + t * vt + (head - Q - K) * vh + d[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if ROTATES and head < Q + K:
        angle = b * cos_batch + t * cos_row + d[None, :]
        c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        sn = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        rotated = first * c + second * sn
        second = second * c - first * sn
        first = rotated
    dtype = dqkv.dtype.element_ty
    offsets = row.to(tl.int64)[:, None] * ((Q + K + V) * 2 * HALF) + (head * 2 * HALF + d)[None, :]
    tl.store(dqkv + offsets, first.to(dtype), mask=inside)
    tl.store(dqkv + offsets + HALF, second.to(dtype), mask=inside)


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, out, length, heads,
    xb, xt, xh, ob, ot, oh, cos_batch, cos_row,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = (head < heads)[:, None] & (d < HALF)[None, :]
    angle = b * cos_batch + t * cos_row + d
    c = tl.load(cos + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    offsets = b * xb + t * xt + head[:, None] * xh + d[None, :]
    first = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    offsets = b * ob + t * ot + head[:, None] * oh + d[None, :]
    dtype = out.dtype.element_ty
    tl.store(out + offsets, (first * c - second * s).to(dtype), mask=inside)
    tl.store(out + offsets + HALF, (second * c + first * s).to(dtype), mask=inside)
