"""Frozen linear layers that share an input, with their LoRA adapters, as one operator.

The operator is opaque to torch.compile: in a compiled layer dropout masks are recomputed from keys
in the kernels of `ops/lora.py`, and NF4 weights are read packed. For the n adapted ones of the
modules i, whose outputs are concatenated:

    y_i = x W_i^T + bias_i + s_j B_j^T        s_j = (m_j * x) A'_j^T         A' = f A
    dx = dy W + sum_j m_j * (ds_j A'_j)       ds_j = dy_j B_j
    dB_j = dy_j^T s_j                         dA_j = f ds_j^T (m_j * x)

(LoRA, arXiv 2106.09685, eq. 3, with PEFT's dropout masks m; f = alpha / r, over 1 - p in training.)
A and B are float32 and so are their gradients; A' and B' are copies in the dtype of all else.
Shapes: x [M, K], y [M, N], A_j [R, K], B_j [N_j, R], A' [n R, K], B' [N, R], keys [n, 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.ops.lora import Update, lora_a_grad, lora_down, lora_input_grad_
from lorakit.ops.lora_output import lora_output_grads
from lorakit.ops.nf4 import dequantize_nf4

# Tensors of one NF4 weight: packed values, code book, scales; nested scales, their code, offset.
NF4_TENSORS = 6


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """Constants of the modules.

    `sizes`: outputs of each. `slots`: the index of each one's adapter, -1 without. `blocks`: NF4
    values per scale, and scales per nested scale; (0, 0) if not NF4.
    """

    sizes: tuple[int, ...]
    inputs: int
    slots: tuple[int, ...]
    blocks: tuple[int, int]


def nf4_tensors(weight: Any) -> list[Tensor]:
    """Tensors of a bitsandbytes NF4 weight with nested scales."""
    state = weight.quant_state
    second = state.state2
    return [weight.data, state.code, state.absmax, second.code, second.absmax, state.offset]


def lora_linear(
    x: Tensor,
    frozen: Sequence[Tensor],
    bias: Tensor | None,
    copies: tuple[Tensor, Tensor],
    factors: tuple[Sequence[Tensor], Sequence[Tensor]],
    keys: Tensor | None,
    p: float,
    factor: float,
    spec: LinearSpec,
) -> Tensor:
    """The concatenated outputs y [..., N] of x [..., K], in the dtype of x.

    Args:
        frozen: [W] of all modules [N, K], or the tensors of each one's NF4 weight in turn.
        bias: [N]; None without.
        copies: A' and B'.
        factors: every A, and every B, of which gradients are computed.
        keys: of the dropout masks; None for no dropout.
        p: dropout's probability.
        factor: f.
    """
    y, _ = _forward(
        x.reshape(-1, spec.inputs), list(frozen), bias, *copies, list(factors[0]),
        list(factors[1]), keys, p, factor, spec.sizes, spec.inputs, spec.slots, spec.blocks,
    )  # fmt: skip
    return y.view(*x.shape[:-1], sum(spec.sizes))


def dense_weight(
    frozen: list[Tensor], sizes: Sequence[int], inputs: int, blocks: Sequence[int], like: Tensor
) -> Tensor:
    """W [N, K] of all modules, dequantized if it is NF4."""
    if not blocks[0]:
        return frozen[0]
    from bitsandbytes.functional import QuantState

    out = torch.empty(sum(sizes), inputs, dtype=like.dtype, device=like.device)
    for number, rows in enumerate(out.split(list(sizes))):
        start = number * NF4_TENSORS
        packed, code, absmax, code2, absmax2, offset = frozen[start : start + NF4_TENSORS]
        second = QuantState(absmax2, code=code2, blocksize=blocks[1], dtype=torch.float32)
        state = QuantState(
            absmax, rows.shape, code, blocks[0], "nf4", like.dtype, offset=offset, state2=second
        )
        dequantize_nf4(packed, state, rows)
    return out


_ARGUMENTS = (
    "Tensor[] frozen, {}Tensor a, Tensor b, {}Tensor? keys, float p, float factor, int[] sizes, "
    "int inputs, int[] slots, int[] blocks"
)


@torch.library.custom_op(
    "lorakit::lora_linear",
    mutates_args=(),
    schema="(Tensor x, "
    + _ARGUMENTS.format("Tensor? bias, ", "Tensor[] all_a, Tensor[] all_b, ")
    + ") -> (Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    frozen: list[Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    all_a: list[Tensor],
    all_b: list[Tensor],
    keys: Tensor | None,
    p: float,
    factor: float,
    sizes: Sequence[int],
    inputs: int,
    slots: Sequence[int],
    blocks: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, n R])."""
    dense = dense_weight(frozen, sizes, inputs, blocks, x)
    y = x @ dense.t() if bias is None else torch.addmm(bias, x, dense.t())
    if not all_a:
        return y, x.new_empty(0)
    update = Update(lora_down(x, a, keys, p), b, tuple(slots))
    for module, (columns, rows) in enumerate(zip(_split(y, sizes), _rows(sizes), strict=True)):
        part = update.of(module, rows)
        if part is not None:
            columns.addmm_(part[0], part[1].t())
    return y, update.s


@_forward.register_fake
def _forward_shapes(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    a, all_a, sizes = rest[2], rest[4], rest[9]
    s = x.new_empty(x.shape[0], a.shape[0]) if all_a else x.new_empty(0)
    return x.new_empty(x.shape[0], sum(sizes)), s


@torch.library.custom_op(
    "lorakit::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor? s, "
    + _ARGUMENTS.format("", "")
    + ") -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    frozen: list[Tensor],
    a: Tensor,
    b: Tensor,
    keys: Tensor | None,
    p: float,
    factor: float,
    sizes: Sequence[int],
    inputs: int,
    slots: Sequence[int],
    blocks: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, all dA [n R, K], all dB [N', R]); the latter are empty without adapters."""
    dy = dy.contiguous()
    dx = dy @ dense_weight(frozen, sizes, inputs, blocks, dy)
    if x is None or s is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    columns = [c for c, slot in zip(_rows(sizes), slots, strict=True) if slot >= 0]
    ds, db = lora_output_grads(dy, Update(s, b, tuple(slots)), columns)
    da = lora_a_grad(ds, x, keys, p, factor)
    return lora_input_grad_(dx, ds, a, keys, p), da, db


@_backward.register_fake
def _backward_shapes(dy: Tensor, x: Any, s: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, b, sizes, inputs, slots = rest[1], rest[2], rest[6], rest[7], rest[8]
    dx = dy.new_empty(dy.shape[0], inputs)
    if x is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    adapted = sum(size for size, slot in zip(sizes, slots, strict=True) if slot >= 0)
    da = a.new_empty(a.shape, dtype=torch.float32)
    return dx, da, b.new_empty(adapted, b.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, frozen, _, a, b, all_a, all_b, keys, *ctx.constants = inputs
    ctx.count = len(frozen)
    ctx.ranks = [t.shape[0] for t in all_a], [t.shape[0] for t in all_b]
    needed = (x, output[1]) if all_a else (None, None)
    ctx.save_for_backward(*needed, a, b, keys, *frozen)


def _gradient(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, s, a, b, keys, *frozen = ctx.saved_tensors
    dx, da, db = _backward(dy, x, s, frozen, a, b, keys, *ctx.constants)
    all_a: list[Tensor] = []
    all_b: list[Tensor] = []
    if x is not None:
        all_a, all_b = list(da.split(ctx.ranks[0])), list(db.split(ctx.ranks[1]))
    return (dx, [None] * ctx.count, None, None, None, all_a, all_b, *[None] * 7)


_forward.register_autograd(_gradient, setup_context=_save)


def _rows(sizes: Sequence[int]) -> list[slice]:
    """The columns of y, or rows of W, that belong to each module."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _split(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return y.split(list(sizes), dim=1)
