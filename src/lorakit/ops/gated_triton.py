"""The gated activation of `gated.py` and its gradient as Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def gated_triton(gu: Tensor, activation: str) -> Tensor:
    """See `gated.gated`."""
    rows, width = gu.shape[0], gu.shape[1] // 2
    h = torch.empty(rows, width, dtype=gu.dtype, device=gu.device)
    grid = (triton.cdiv(width, BLOCK), rows)
    _forward_kernel[grid](gu, h, width, SILU=activation == "silu", BLOCK=BLOCK)
    return h


def gated_backward_triton(dh: Tensor, gu: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See `gated.gated_backward`."""
    rows, width = dh.shape
    dgu = torch.empty_like(gu)
    h = torch.empty_like(dh)
    grid = (triton.cdiv(width, BLOCK), rows)
    _backward_kernel[grid](dh, gu, dgu, h, width, SILU=activation == "silu", BLOCK=BLOCK)
    return dgu, h


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


@triton.jit
def _forward_kernel(gu, h, width, SILU: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gu + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gu + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    act, _ = _activate(g, SILU)
    tl.store(h + row * width + column, (act * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dh, gu, dgu, h, width, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gu + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gu + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * width + column, mask=inside, other=0.0).to(tl.float32)
    act, slope = _activate(g, SILU)
    kind = dgu.dtype.element_ty
    tl.store(dgu + row * 2 * width + column, (d * u * slope).to(kind), mask=inside)
    tl.store(dgu + row * 2 * width + width + column, (d * act).to(kind), mask=inside)
    tl.store(h + row * width + column, (act * u).to(kind), mask=inside)
