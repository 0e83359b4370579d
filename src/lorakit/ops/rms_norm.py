"""RMS norm with a frozen weight, and its gradient.

    y = x * rstd * (w + offset)       rstd = 1 / sqrt(mean(x^2) + eps)     (arXiv 1910.07467, eq. 4)
    dx = rstd * (g - n * mean(g * n)) + residual     g = dy * (w + offset),  n = x * rstd

`offset` is 1 for Gemma, which stores w - 1. All arithmetic is float32; results have x's dtype.
Shapes: x, y, dy, residual [M, D]; w [D]; rstd [M] float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(y, rstd)."""
    if has_kernels(x):
        from lorakit.ops.rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, offset)
    return rms_norm_reference(x, weight, eps, offset)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The gradient of x, plus `residual` if the input also bypasses the norm."""
    if has_kernels(x):
        from lorakit.ops.rms_norm_triton import rms_norm_backward_triton

        return rms_norm_backward_triton(dy, x, weight, rstd, offset, residual)
    return rms_norm_backward_reference(dy, x, weight, rstd, offset, residual)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The definition."""
    x32 = x.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1) + eps)
    y = x32 * rstd.unsqueeze(-1) * (weight.float() + offset)
    return y.to(x.dtype), rstd


def rms_norm_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition."""
    scale = rstd.unsqueeze(-1)
    normal = x.float() * scale
    g = dy.float() * (weight.float() + offset)
    dx = scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + residual.float()
    return dx.to(x.dtype)
