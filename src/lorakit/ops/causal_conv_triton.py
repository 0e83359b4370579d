"""The causal convolution of `causal_conv.py` and its gradient as Triton kernels on [B, T, D]."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N = 16, 128  # tokens and channels of a program


def causal_conv_triton(
    rows: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, documents: Tensor | None
) -> Tensor:
    """y as [B, T, D]; see `causal_conv.causal_conv`."""
    rows, given, options = _prepare(rows, weight, bias, documents)
    out = torch.empty_like(rows)
    _forward_kernel[_grid(rows)](rows, *given, out, *rows.shape[1:], SILU=silu, **options)
    return out


def causal_conv_backward_triton(
    dy: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    documents: Tensor | None,
) -> Tensor:
    """dx as [B, T, D]."""
    rows, given, options = _prepare(rows, weight, bias, documents)
    sums_grad = dy.contiguous()
    if silu:
        dy, sums_grad = sums_grad, torch.empty_like(rows)
        _silu_grad_kernel[_grid(rows)](dy, rows, *given, sums_grad, *rows.shape[1:], **options)
    dx = torch.empty_like(rows)
    weight, _, documents = given
    del options["BIAS"]
    _backward_kernel[_grid(rows)](
        sums_grad, weight, documents, dx, *rows.shape[1:], **options,
    )  # fmt: skip
    return dx


def _prepare(
    rows: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor | None], dict[str, Any]]:
    """The tensors without gaps, and the kernels' constants."""
    if bias is not None:
        bias = bias.contiguous()
    if documents is not None:
        documents = documents.expand(rows.shape[0], -1).contiguous()
    options = {
        "TAPS": weight.shape[1], "BIAS": bias is not None, "DOCUMENTS": documents is not None,
        "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N,
    }  # fmt: skip
    return rows.contiguous(), (weight.contiguous(), bias, documents), options


def _grid(rows: Tensor) -> tuple[int, int, int]:
    batch, tokens, width = rows.shape
    return triton.cdiv(tokens, BLOCK_M), triton.cdiv(width, BLOCK_N), batch


@triton.jit
def _same(documents, batch, tokens, one, other, DOCUMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """True where both tokens exist and are of one document."""
    inside = (one >= 0) & (one < tokens) & (other >= 0) & (other < tokens)
    if DOCUMENTS:
        first = tl.load(documents + batch * tokens + one, mask=inside, other=0)
        inside = inside & (
            tl.load(documents + batch * tokens + other, mask=inside, other=0) == first
        )
    return inside


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    rows, weight, bias, documents, batch, token, column, tokens, width,
    TAPS: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c of some tokens, rounded."""
    channel = column < width
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for j in tl.static_range(TAPS):
        w = tl.load(weight + column * TAPS + TAPS - 1 - j, mask=channel, other=0.0)
        inside = _same(documents, batch, tokens, token, token - j, DOCUMENTS)
        at = (batch * tokens + token - j)[:, None] * width + column[None, :]
        x = tl.load(rows + at, mask=inside[:, None] & channel[None, :], other=0.0)
        total += x.to(tl.float32) * w.to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + column, mask=channel, other=0.0).to(tl.float32)[None, :]
    return total.to(rows.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    rows, weight, bias, documents, out, tokens, width,
    TAPS: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = _sums(
        rows, weight, bias, documents, batch, token, column, tokens, width,
        TAPS, BIAS, DOCUMENTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    at = (batch * tokens + token)[:, None] * width + column[None, :]
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _silu_grad_kernel(  # type: ignore[no-untyped-def]
    dy, rows, weight, bias, documents, out, tokens, width,
    TAPS: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dy silu'(c), rounded as torch rounds it."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = _sums(
        rows, weight, bias, documents, batch, token, column, tokens, width,
        TAPS, BIAS, DOCUMENTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    at = (batch * tokens + token)[:, None] * width + column[None, :]
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    gate = 1.0 / (1.0 + tl.exp(-value))
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    grad *= gate * (1.0 + value * (1.0 - gate))
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    dc, weight, documents, dx, tokens, width,
    TAPS: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = column < width
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for j in tl.static_range(TAPS):
        inside = _same(documents, batch, tokens, token, token + j, DOCUMENTS)
        at = (batch * tokens + token + j)[:, None] * width + column[None, :]
        grad = tl.load(dc + at, mask=inside[:, None] & channel[None, :], other=0.0)
        w = tl.load(weight + column * TAPS + TAPS - 1 - j, mask=channel, other=0.0)
        total += grad.to(tl.float32) * w.to(tl.float32)[None, :]
    at = (batch * tokens + token)[:, None] * width + column[None, :]
    inside = (token < tokens)[:, None] & channel[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
