"""Rotary position embedding of queries and keys, and its gradient.

Rotary position embedding (arXiv 2104.09864, eq. 34) in transformers' half-split form:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x1, x2: halves of a head

The gradient is the rotation by the negative angle. Shapes: x [B, T, H, d], any strides with a
contiguous last dimension; cos, sin [1 or B, T, d], each half the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels, has_matrix_kernels
from lorakit.ops.lora import Update


def rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Write x rotated to `out`, which may be x itself; return `out`."""
    if has_kernels(x):
        from lorakit.ops.rope_triton import rope_triton

        return rope_triton(x, cos, sin, out)
    return rope_reference(x, cos, sin, out)


def rotate_qkv_(
    qkv: Tensor,
    heads: tuple[int, int, int],
    width: int,
    angles: tuple[Tensor, Tensor] | None,
    update: Update | None,
) -> Tensor:
    """Add the adapters' `update` to qkv [B*T, N] and rotate its queries and keys, in place.

    Args:
        heads: of queries, keys and values, each `width` columns, in this order.
        angles: (cos, sin) [1 or B, T, width]; None skips rotation (SmolLM3's NoPE layers).
    """
    if has_kernels(qkv):
        from lorakit.ops.rope_triton import rotate_qkv_triton_

        if update is not None and not has_matrix_kernels(qkv):
            rotate_qkv_reference_(qkv, heads, width, None, update)
            update = None
        return rotate_qkv_triton_(qkv, heads, width, angles, update)
    return rotate_qkv_reference_(qkv, heads, width, angles, update)


def unrotate_qkv(
    dq: Tensor, dk: Tensor, dv: Tensor, angles: tuple[Tensor, Tensor] | None
) -> Tensor:
    """dqkv [B*T, N] before rotation, from the gradients [B, T, H, d] of rotated q and k, and v."""
    if has_kernels(dq):
        from lorakit.ops.rope_triton import unrotate_qkv_triton

        return unrotate_qkv_triton(dq, dk, dv, angles)
    return unrotate_qkv_reference(dq, dk, dv, angles)


def unrotate_qkv_reference(
    dq: Tensor, dk: Tensor, dv: Tensor, angles: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The definition."""
    if angles is not None:
        dq, dk = (
            rope_reference(t, *angles, out=torch.empty_like(t), inverse=True) for t in (dq, dk)
        )
    return torch.cat([dq, dk, dv], 2).flatten(2).flatten(0, 1)


def rotate_qkv_reference_(
    qkv: Tensor,
    heads: tuple[int, int, int],
    width: int,
    angles: tuple[Tensor, Tensor] | None,
    update: Update | None,
) -> Tensor:
    """The definition."""
    start = 0
    for module, count in enumerate(heads):
        rows = slice(start, start + count * width)
        start = rows.stop
        low_rank = update.of(module, rows) if update else None
        columns = qkv[:, rows]
        if low_rank is not None:
            columns += low_rank[0] @ low_rank[1].t()
        if angles is not None and module < 2:
            length = angles[0].shape[1]
            view = columns.unflatten(0, (-1, length)).unflatten(-1, (count, width))
            rope_reference(view, *angles, out=view)
    return qkv


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
