"""Dequantize bitsandbytes NF4 weights to 16 or 32 bits.

    w[i] = code[q[i]] * absmax[i // 64]          absmax = code2[q2] * absmax2 + offset (nested)

(QLoRA, arXiv 2305.14314, eq. 5.) bitsandbytes uses three launches and a float32 copy of absmax;
the kernel uses one launch and is bit-identical.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels


def dequantize_nf4(weight: Tensor, state: Any, out: Tensor) -> Tensor:
    """Write the weight [N, K] into `out` (contiguous) and return it.

    Args:
        weight: packed uint8, two values per byte, the first in the high half.
        state: the weight's bitsandbytes QuantState.
    """
    if has_kernels(weight) and state.nested and state.quant_type == "nf4":
        from lorakit.ops.nf4_triton import dequantize_nf4_triton

        return dequantize_nf4_triton(weight, state, out)
    return dequantize_nf4_reference(weight, state, out)


def dequantize_nf4_reference(weight: Tensor, state: Any, out: Tensor) -> Tensor:
    """bitsandbytes' own dequantization: the definition."""
    import bitsandbytes as bnb

    out.copy_(bnb.functional.dequantize_4bit(weight, state).view_as(out))
    return out


def dequantize_nf4_plain(weight: Tensor, state: Any) -> Tensor:
    """The formula in plain torch, float32 [N, K]; for tests of the kernel without a GPU."""
    absmax = state.absmax
    if state.nested:
        second = state.state2
        scales = second.code[absmax.long()].view(-1)
        absmax = scales * second.absmax.repeat_interleave(second.blocksize)[: scales.numel()]
        absmax = absmax + state.offset
    packed = weight.view(-1).long()
    values = state.code[torch.stack([packed >> 4, packed & 15], -1).view(-1)]
    return (values.view(-1, state.blocksize) * absmax.view(-1, 1)).view(state.shape)
