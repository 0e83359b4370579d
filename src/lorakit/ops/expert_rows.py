"""One row per choice of a token, sorted by expert; and the weighted sum of a token's rows.

Row s belongs to token t(s) with the router's weight w_s; each token has k rows.

    x_s = h_t(s)                  dh_t = sum over t's rows of dx_s
    o_t = sum of w_s y_s          dy_s = w_s do_t(s)        dw_s = do_t(s) . y_s

Both sums have a fixed order, which index_add has not on a GPU. They are computed in float32 and
rounded to the dtype of the rows. Separate torch operations took 5 of 16 ms of a layer of
Qwen3-30B-A3B with 8,192 tokens (H200).
Shapes: T tokens, S = T k rows, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels

REFERENCE_ROWS = 4096  # at once in plain torch, which needs them in float32


class Dispatch(torch.autograd.Function):
    """Rows of tokens [T, D], once for each of their k experts, sorted: [T k, D].

    `order` [T k] has the choice, token * k + number, of each sorted row; `back` is its inverse.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, back: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.choices = choices
        return tokens[order // choices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return sum_rows(grad.contiguous(), back, None, ctx.choices), None, None, None


class Combine(torch.autograd.Function):
    """Sum of each token's rows, weighted by the router: y [T k, D], weights [T, k] -> [T, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order)
        return sum_rows(y, back, weights, weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, weights, order = ctx.saved_tensors
        return *weighted_rows(grad.contiguous(), y, weights.contiguous(), order), None, None


def sum_rows(rows: Tensor, back: Tensor, weights: Tensor | None, choices: int) -> Tensor:
    """Sum of each token's `choices` rows [T, D], times `weights` [T, k] if given."""
    if has_kernels(rows):
        from lorakit.ops.expert_rows_triton import sum_rows_triton

        return sum_rows_triton(rows, back, weights, choices)
    return sum_rows_reference(rows, back, weights, choices)


def sum_rows_reference(rows: Tensor, back: Tensor, weights: Tensor | None, choices: int) -> Tensor:
    """The definition of `sum_rows`."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(len(back) // choices, rows.shape[1], dtype=exact)
    for number, row in enumerate(back.view(-1, choices).unbind(1)):
        part = rows[row].to(exact)
        total += part if weights is None else part * weights[:, number, None].to(exact)
    return total.to(rows.dtype)


def weighted_rows(grad: Tensor, y: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the rows y [S, D], gradient of the weights [T, k]) from that of the sums."""
    if has_kernels(grad):
        from lorakit.ops.expert_rows_triton import weighted_rows_triton

        return weighted_rows_triton(grad, y, weights, order)
    return weighted_rows_reference(grad, y, weights, order)


def weighted_rows_reference(
    grad: Tensor, y: Tensor, weights: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition of `weighted_rows`."""
    exact = torch.promote_types(y.dtype, torch.float32)
    of_rows, flat = torch.empty_like(y), weights.reshape(-1).to(exact)
    of_weights = torch.empty_like(flat)
    for rows in torch.arange(len(order), device=order.device).split(REFERENCE_ROWS):
        choice = order[rows]
        of_sum = grad[choice // weights.shape[-1]].to(exact)
        of_rows[rows] = (of_sum * flat[choice, None]).to(y.dtype)
        of_weights[choice] = (of_sum * y[rows].to(exact)).sum(dim=-1)
    return of_rows, of_weights.view_as(weights).to(weights.dtype)
