"""The rotation of `rope.py` as a Triton kernel: one token a program, heads in blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 8


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool = False) -> Tensor:
    """See `rope.rope`."""
    batch, length, heads, width = x.shape
    cos_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    grid = (batch * length, triton.cdiv(heads, BLOCK_H))
    _rope_kernel[grid](
        x, cos, sin, out, length, heads,
        x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
        cos_batch, cos.stride(1),
        HALF=width // 2, BLOCK_D=triton.next_power_of_2(width // 2), BLOCK_H=BLOCK_H,
        INVERSE=inverse, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, out, length, heads,
    xb, xt, xh, ob, ot, oh, cos_batch, cos_row,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = (head < heads)[:, None] & (d < HALF)[None, :]
    angle = b * cos_batch + t * cos_row + d
    c = tl.load(cos + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    place = b * xb + t * xt + head[:, None] * xh + d[None, :]
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=inside, other=0.0).to(tl.float32)
    place = b * ob + t * ot + head[:, None] * oh + d[None, :]
    kind = out.dtype.element_ty
    tl.store(out + place, (first * c - second * s).to(kind), mask=inside)
    tl.store(out + place + HALF, (second * c + first * s).to(kind), mask=inside)
