"""The causal depthwise convolution of hybrid layers with its activation, and its gradient.

    c_t = b + sum_j w[W - 1 - j] x_{t-j}  for j < W, if t - j is of t's document      y = silu(c)
    dx_t = sum_j w[W - 1 - j] dy_{t+j} silu'(c_{t+j})  for j < W, if t + j is of t's document

The sum is float32, rounded to x's dtype before the activation. Shapes: x, y [B, D, T], as the
layers have it: a transposed [B, T, D]; w [D, W]; b [D]; documents int32 [B, T]. The kernel has
gradients of x alone; a trained w or b uses plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.backend import has_kernels


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, documents: Tensor | None = None
) -> Tensor:
    """y, differentiable."""
    if torch.compiler.is_compiling():  # fuses it, and cannot read the GPU's capability
        return causal_conv_reference(x, weight, bias, silu, documents)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if has_kernels(x) and not (trained and torch.is_grad_enabled()):
        rows = x.transpose(1, 2).contiguous()
        return _forward_op(rows, weight, bias, silu, documents).transpose(1, 2)
    return causal_conv_reference(x, weight, bias, silu, documents)


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, documents: Tensor | None = None
) -> Tensor:
    """The definition: shifted multiplies, which torch.compile fuses."""
    rows, w = x.transpose(1, 2), weight.float()
    tokens, width = rows.shape[1], w.shape[1]
    total = rows.float() * w[:, -1]
    for shift in range(1, min(width, tokens)):
        product = rows[:, : tokens - shift].float() * w[:, width - 1 - shift]
        if documents is not None:
            same = documents[:, shift:] == documents[:, : tokens - shift]
            product = torch.where(same.unsqueeze(-1), product, 0.0)
        total = total + F.pad(product, (0, 0, shift, 0))
    if bias is not None:
        total = total + bias.float()
    total = total.to(x.dtype)
    return (F.silu(total) if silu else total).transpose(1, 2)


@torch.library.custom_op(
    "lorakit::causal_conv",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias, bool silu, Tensor? documents) -> Tensor",
)
def _forward_op(
    rows: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, documents: Tensor | None
) -> Tensor:
    from lorakit.ops.causal_conv_triton import causal_conv_triton

    return causal_conv_triton(rows, weight, bias, silu, documents)


@torch.library.custom_op(
    "lorakit::causal_conv_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor rows, Tensor weight, Tensor? bias, bool silu, Tensor? documents) "
    "-> Tensor",
)
def _backward_op(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    documents: Tensor | None,
) -> Tensor:
    from lorakit.ops.causal_conv_triton import causal_conv_backward_triton

    return causal_conv_backward_triton(dy, rows, weight, bias, silu, documents)


@_forward_op.register_fake
def _forward_shape(
    rows: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, documents: Tensor | None
) -> Tensor:
    return rows.new_empty(rows.shape)


@_backward_op.register_fake
def _backward_shape(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    documents: Tensor | None,
) -> Tensor:
    return rows.new_empty(rows.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, bias, silu, documents = inputs
    ctx.save_for_backward(rows, weight, bias, documents)
    ctx.silu = silu


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, bias, documents = ctx.saved_tensors
    return _backward_op(dy, rows, weight, bias, ctx.silu, documents), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
