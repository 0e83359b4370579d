"""The RMS norm of `rms_norm.py` and its gradient as Triton kernels: one row per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `rms_norm.rms_norm`."""
    rows, width = x.shape
    y = torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _forward_kernel[(rows,)](
        x, weight, y, rstd, width, eps, offset, BLOCK=block, num_warps=_warps(block)
    )
    return y, rstd


def rms_norm_backward_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """See `rms_norm.rms_norm_backward`."""
    rows, width = x.shape
    dx = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _backward_kernel[(rows,)](
        dy, x, weight, rstd, dx if residual is None else residual, dx, width, offset,
        RESIDUAL=residual is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, rstd, width, eps, offset, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + row * width + column, (value * scale * w).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy, x, weight, rstd, residual, dx, width, offset, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    offsets = row * width + column
    scale = tl.load(rstd + row)
    normal = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) * scale
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32) * w
    mean = tl.sum(g * normal, 0) / width
    value = scale * (g - normal * mean)
    if RESIDUAL:
        value += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + offsets, value.to(dx.dtype.element_ty), mask=inside)
