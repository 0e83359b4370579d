"""The row loss of `cross_entropy.py` as a Triton kernel: two passes over a row, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def cross_entropy_triton_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """See `cross_entropy.cross_entropy_`."""
    rows, width = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _kernel[(rows,)](
        logits, targets, loss, width, logits.stride(0), GRADIENT=gradient,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip
    return loss


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits, targets, loss, width, stride, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    start_of_row = logits + row * stride
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(start_of_row + column, mask=column < width, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    norm = top + tl.log(total)
    counts = tl.where(target >= 0, 1.0, 0.0)
    chosen = tl.load(start_of_row + tl.maximum(target, 0)).to(tl.float32)
    tl.store(loss + row, (norm - chosen) * counts)
    if GRADIENT:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            z = tl.load(start_of_row + column, mask=inside, other=-float("inf")).to(tl.float32)
            dz = (tl.exp(z - norm) - tl.where(column == target, 1.0, 0.0)) * counts
            tl.store(start_of_row + column, dz.to(logits.dtype.element_ty), mask=inside)
