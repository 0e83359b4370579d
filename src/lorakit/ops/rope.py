"""Queries or keys and the angles of their positions enter; the rotated ones leave.

Rotary position embedding (arXiv 2104.09864, eq. 34) in transformers' half-split form:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x1, x2: halves of a head

The gradient is the rotation by the negative angle. Shapes: x [B, T, H, d], any strides with a
contiguous last dimension; cos, sin [1 or B, T, d], each half the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels


def rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool = False) -> Tensor:
    """Write x rotated (or rotated back) into `out`, which may be x itself; returns `out`."""
    if has_kernels(x):
        from lorakit.ops.rope_triton import rope_triton

        return rope_triton(x, cos, sin, out, inverse)
    return rope_reference(x, cos, sin, out, inverse)


def rope_reference(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool = False
) -> Tensor:
    """The definition, in float32."""
    half = x.shape[-1] // 2
    c, s = (t.float()[..., :half].unsqueeze(-2) for t in (cos, sin))
    if inverse:
        s = -s
    first, second = x.float().split(half, -1)
    out.copy_(torch.cat([first * c - second * s, second * c + first * s], -1))
    return out
