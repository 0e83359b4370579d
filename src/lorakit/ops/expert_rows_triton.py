"""The sums of `ops/expert_rows.py` as Triton kernels; one program per token, or per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def sum_rows_triton(rows: Tensor, back: Tensor, weights: Tensor | None, choices: int) -> Tensor:
    """See `expert_rows.sum_rows`; `rows` is contiguous."""
    tokens, width = back.numel() // choices, rows.shape[1]
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    given = back if weights is None else weights.contiguous()
    _sum_kernel[(tokens, triton.cdiv(width, BLOCK))](
        rows, back, given, out, width,
        CHOICES=choices, WEIGHTED=weights is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def weighted_rows_triton(
    grad: Tensor, y: Tensor, weights: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """See `expert_rows.weighted_rows`; all are contiguous."""
    of_rows, of_weights = torch.empty_like(y), torch.empty_like(weights)
    _weighted_kernel[(len(order),)](
        grad, y, weights, order, of_rows, of_weights, y.shape[1], weights.shape[-1], BLOCK=BLOCK
    )
    return of_rows, of_weights


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    rows, back, weights, out, width,
    CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(CHOICES):
        row = tl.load(back + token * CHOICES + number).to(tl.int64)
        tile = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            tile = tile * tl.load(weights + token * CHOICES + number).to(tl.float32)
        total += tile
    tl.store(out + token * width + column, total, mask=inside)


@triton.jit
def _weighted_kernel(  # type: ignore[no-untyped-def]
    grad, y, weights, order, of_rows, of_weights, width, choices, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + row).to(tl.int64)
    token = choice // choices
    weight = tl.load(weights + choice).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        of_sum = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(y + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_rows + row * width + column, of_sum * weight, mask=inside)
        total += of_sum * value
    tl.store(of_weights + choice, tl.sum(total, 0))
