"""The gated activation of `ops/glu.py` and its gradient as Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.dropout_mask import threshold
from lorakit.ops.kernel_launch import launch_kernel
from lorakit.ops.lora import InputGrad, Update
from lorakit.ops.lora_triton import low_rank_tile, masked_low_rank_tile, matrix_block

# Chosen on an H100 (benchmarks/time_ops.py).
FORWARD = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}
BACKWARD = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 8}


def gated_triton(gu: Tensor, activation: str, update: Update | None = None) -> Tensor:
    """See `glu.gated`."""
    rows, width = gu.shape[0], gu.shape[1] // 2
    h = torch.empty(rows, width, dtype=gu.dtype, device=gu.device)
    _launch(gu, gu, gu, h, activation, update)
    return h


def gated_backward_triton(
    dh: Tensor,
    gu: Tensor,
    activation: str,
    update: Update | None = None,
    down: InputGrad | None = None,
) -> tuple[Tensor, Tensor]:
    """See `glu.gated_backward`."""
    dgu = torch.empty_like(gu)
    h = torch.empty_like(dh)
    _launch(dh, gu, dgu, h, activation, update, down, backward=True)
    return dgu, h


def _launch(
    dh: Tensor,
    gu: Tensor,
    dgu: Tensor,
    h: Tensor,
    activation: str,
    update: Update | None,
    down: InputGrad | None = None,
    backward: bool = False,
) -> None:
    rows, width = h.shape
    of_s, b, slots = (update.s, update.b, update.slots) if update else (gu, gu, (-1, -1))
    rank = update.rank if update else 1
    ds, a, keys, p = (down.ds, down.a, down.keys, down.p) if down else (gu, gu, None, 0.0)
    rank_d = a.shape[0] if down else 1
    launch_kernel(
        _kernel, BACKWARD if backward else FORWARD,
        lambda s: (triton.cdiv(rows, s["BLOCK_M"]), triton.cdiv(width, s["BLOCK_N"])),
        dh, gu, dgu, h, of_s, b, ds, a, gu if keys is None else keys, rows, width,
        of_s.stride(0), ds.stride(0), threshold(p),
        DOWN=down is not None, MASKED=keys is not None and p > 0.0,
        RANK_D=rank_d, BLOCK_D=matrix_block(rank_d),
        SLOT_G=slots[0], SLOT_U=slots[1], RANK=rank, BLOCK_R=matrix_block(rank),
        SILU=activation == "silu", BACKWARD=backward,
    )  # fmt: skip


@triton.jit
def _activate(g, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """(act(g), act'(g))."""
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-g))
        return g * s, s * (1.0 + g * (1.0 - s))
    inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    t = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
    return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope


@triton.jit(do_not_specialize=["threshold"])
def _kernel(  # type: ignore[no-untyped-def]
    dh, gu, dgu, h, s, b, ds, a, keys, rows, width, s_stride, ds_stride, threshold,
    DOWN: tl.constexpr, MASKED: tl.constexpr, RANK_D: tl.constexpr, BLOCK_D: tl.constexpr,
    SLOT_G: tl.constexpr, SLOT_U: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    SILU: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    wide = row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    narrow = row.to(tl.int64)[:, None] * width + column[None, :]
    g = tl.load(gu + wide, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gu + wide + width, mask=inside, other=0.0).to(tl.float32)
    g = low_rank_tile(g, s, b, row, column, rows, width, s_stride, SLOT_G, RANK, BLOCK_R)
    up = column + width
    u = low_rank_tile(u, s, b, row, up, rows, 2 * width, s_stride, SLOT_U, RANK, BLOCK_R)
    act, slope = _activate(g, SILU)
    dtype = h.dtype.element_ty
    tl.store(h + narrow, (act * u).to(dtype), mask=inside)
    if BACKWARD:
        d = tl.load(dh + narrow, mask=inside, other=0.0).to(tl.float32)
        if DOWN:
            d = masked_low_rank_tile(
                d, ds, a, keys, row, column, rows, width, ds_stride, threshold,
                0, MASKED, RANK_D, BLOCK_D,
            )  # fmt: skip
        tl.store(dgu + wide, (d * u * slope).to(dtype), mask=inside)
        tl.store(dgu + wide + width, (d * act).to(dtype), mask=inside)
