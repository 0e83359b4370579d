"""Gated activation of gate and up projections, and its gradient.

    h = act(g) * u        dg = dh * u * act'(g)        du = dh * act(g)

act is SiLU (SwiGLU, arXiv 2002.05202) or GELU in its tanh form (Gemma's GeGLU). g and u are the
frozen products; the adapters' update is a product of depth R computed in the same kernel, so that
the sum is never written to memory (a separate pass took 480 of 2,370 us at 8,192 tokens and rank
64).
Shapes: gu [M, 2I] holds g in its first I columns and u in the rest; h, dh [M, I].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.ops.backend import has_kernels, has_matrix_kernels
from lorakit.ops.lora import InputGrad, Update, lora_input_grad_

ACTIVATIONS = ("silu", "gelu_tanh")
GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def gated(gu: Tensor, activation: str, update: Update | None = None) -> Tensor:
    """h [M, I] of gu plus `update`."""
    if has_kernels(gu):
        from lorakit.ops.glu_triton import gated_triton

        if update is not None and not has_matrix_kernels(gu):
            gu, update = _added(gu, update, torch.empty_like(gu)), None
        return gated_triton(gu, activation, update)
    return gated_reference(gu, activation, update)


def gated_backward(
    dh: Tensor,
    gu: Tensor,
    activation: str,
    update: Update | None = None,
    down: InputGrad | None = None,
) -> tuple[Tensor, Tensor]:
    """(dgu [M, 2I], h [M, I]); the adapter of the next layer needs h.

    Args:
        down: that adapter's part of dh; dh and gu may be overwritten.
    """
    if has_kernels(gu):
        from lorakit.ops.glu_triton import gated_backward_triton

        if not has_matrix_kernels(gu):
            gu, update = _added(gu, update, gu), None
            if down is not None:
                dh, down = lora_input_grad_(dh, down.ds, down.a, down.keys, down.p), None
        return gated_backward_triton(dh, gu, activation, update, down)
    if down is not None:
        dh = lora_input_grad_(dh, down.ds, down.a, down.keys, down.p)
    return gated_backward_reference(dh, gu, activation, update)


def _added(gu: Tensor, update: Update | None, out: Tensor) -> Tensor:
    """Write gu plus `update` to `out`, by separate products if no kernel can compute them."""
    inner = gu.shape[1] // 2
    for module, rows in enumerate((slice(0, inner), slice(inner, 2 * inner))):
        low_rank = update.of(module, rows) if update else None
        if low_rank is not None:
            torch.addmm(gu[:, rows], low_rank[0], low_rank[1].t(), out=out[:, rows])
        elif out is not gu:
            out[:, rows] = gu[:, rows]
    return out


def gated_reference(gu: Tensor, activation: str, update: Update | None = None) -> Tensor:
    """The definition, in float32."""
    g, u = _halves(gu, update)
    return (_act(g, activation) * u).to(gu.dtype)


def gated_backward_reference(
    dh: Tensor, gu: Tensor, activation: str, update: Update | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in float32."""
    g, u = _halves(gu, update)
    dh32 = dh.float()
    act = _act(g, activation)
    dgu = torch.cat([dh32 * u * _slope(g, activation), dh32 * act], -1)
    return dgu.to(gu.dtype), (act * u).to(gu.dtype)


def _halves(gu: Tensor, update: Update | None) -> list[Tensor]:
    """(g, u) in float32, adapters included."""
    inner = gu.shape[1] // 2
    halves = []
    for module, rows in enumerate((slice(0, inner), slice(inner, 2 * inner))):
        half = gu[:, rows].float()
        low_rank = update.of(module, rows) if update else None
        if low_rank is not None:
            half = half + low_rank[0].float() @ low_rank[1].float().t()
        halves.append(half)
    return halves


def _act(g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(g)
    return functional.gelu(g, approximate="tanh")


def _slope(g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        s = torch.sigmoid(g)
        return s * (1 + g * (1 - s))
    t = torch.tanh(GELU_SCALE * (g + GELU_CUBIC * g**3))
    inner = GELU_SCALE * (1 + 3 * GELU_CUBIC * g * g)
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * inner


class GatedActivation(torch.autograd.Function):
    """h [M, I] of gu [M, 2I] for autograd, which keeps gu only."""

    @staticmethod
    def forward(ctx: Any, gu: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gu)
        ctx.activation = activation
        return gated(gu, activation)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        (gu,) = ctx.saved_tensors
        return gated_backward(dh.contiguous(), gu, ctx.activation)[0], None
