"""The dequantization of `nf4.py` as one Triton kernel, nested scales included."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES = 1024


def dequantize_nf4_triton(weight: Tensor, state: Any, out: Tensor) -> Tensor:
    """See `nf4.dequantize_nf4`; the scales must be nested (double quantization)."""
    size = out.numel()
    second = state.state2
    grid = (triton.cdiv(size // 2, BLOCK_BYTES),)
    _kernel[grid](
        weight, state.absmax, second.code, second.absmax, state.offset, state.code, out, size // 2,
        BLOCK=BLOCK_BYTES, GROUP=state.blocksize // 2, GROUP2=second.blocksize, num_warps=4,
        # bitsandbytes multiplies and adds in two launches; a fused multiply-add rounds differently.
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    packed, absmax, code2, absmax2, offset, code, out, size,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUP2: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    byte = tl.load(packed + offsets, mask=inside, other=0).to(tl.int32)
    # One scale per GROUP bytes: loaded once, then broadcast to its bytes in registers.
    group = tl.program_id(0).to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    valid = group * GROUP < size
    scale = tl.load(code2 + tl.load(absmax + group, mask=valid, other=0).to(tl.int32))
    scale = scale * tl.load(absmax2 + group // GROUP2, mask=valid, other=0.0)
    scale = scale + tl.load(offset)
    byte_scale = tl.reshape(tl.broadcast_to(scale[:, None], (BLOCK // GROUP, GROUP)), (BLOCK,))
    high = tl.load(code + (byte >> 4)) * byte_scale
    low = tl.load(code + (byte & 15)) * byte_scale
    both = tl.interleave(high, low).to(out.dtype.element_ty)
    out_offsets = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + out_offsets, both, mask=out_offsets < 2 * size)
