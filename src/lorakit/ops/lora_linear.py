"""A frozen linear layer with its LoRA adapter as one operator, opaque to torch.compile.

    y = x W^T + bias + s B^T        s = (m * x) A'^T        A' = f A        f = scale / (1 - p)
    dx = dy W + m * (ds A')         ds = dy B       dB = dy^T s       dA = f ds^T (m * x)

(LoRA, arXiv 2106.09685, eq. 3, with PEFT's dropout mask m.) Inside a compiled layer this keeps
dropout in the kernels of `ops/lora.py`, which recompute masks from keys, and reads NF4 weights
packed. Adapters and their gradients are float32, all else has the dtype of the frozen weight.
Shapes: x [M, K], y [M, N], A [R, K], B [N, R].
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorakit.ops.lora import Update, lora_a_grad, lora_down, lora_input_grad_
from lorakit.ops.lora_output import lora_output_grads
from lorakit.ops.nf4 import dequantize_nf4

# Tensors of an NF4 weight: packed values, code book, scales; with nested scales four more.
FourBit = list[Tensor]


def four_bit_parts(weight: Any) -> FourBit:
    """Tensors of a bitsandbytes 4-bit weight, in the order that `dense_weight` expects."""
    state = weight.quant_state
    parts = [weight.data, state.code, state.absmax]
    if state.nested:
        parts += [state.state2.code, state.state2.absmax, state.offset]
    return parts


def dense_weight(
    weight: Tensor | None,
    four_bit: FourBit,
    outputs: int,
    inputs: int,
    block: int,
    block_of_scales: int,
    dtype: torch.dtype,
) -> Tensor:
    """The frozen weight [N, K]: itself, or dequantized from NF4.

    Args:
        block: NF4 values per scale.
        block_of_scales: scales per second-level scale.
    """
    if weight is not None:
        return weight
    packed, code, absmax, *nested = four_bit
    state = SimpleNamespace(
        code=code, absmax=absmax, nested=bool(nested), blocksize=block, quant_type="nf4",
        shape=torch.Size((outputs, inputs)), dtype=dtype,
    )  # fmt: skip
    if nested:
        state.state2 = SimpleNamespace(code=nested[0], absmax=nested[1], blocksize=block_of_scales)
        state.offset = nested[2]
    out = torch.empty(outputs, inputs, dtype=dtype, device=packed.device)
    return dequantize_nf4(packed, state, out)


@torch.library.custom_op("lorakit::lora_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    four_bit: list[Tensor],
    outputs: int,
    inputs: int,
    block: int,
    block_of_scales: int,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    keys: Tensor | None,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R] for the backward; s is empty without an adapter)."""
    dense = dense_weight(weight, four_bit, outputs, inputs, block, block_of_scales, x.dtype)
    y = x @ dense.t() if bias is None else torch.addmm(bias, x, dense.t())
    if a is None or b is None:
        return y, x.new_empty(0)
    s = lora_down(x, _scaled(a, p, keys, scale, x.dtype), keys, p)
    return y.addmm_(s, b.to(x.dtype).t()), s


@_forward.register_fake
def _(
    x: Tensor, weight: Any, four_bit: Any, outputs: int, inputs: int, block: int,
    block_of_scales: int, bias: Any, a: Any, b: Any, keys: Any, p: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = x.shape[0]
    s = x.new_empty(0) if a is None else x.new_empty(rows, a.shape[0])
    return x.new_empty(rows, outputs), s


@torch.library.custom_op("lorakit::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor | None,
    four_bit: list[Tensor],
    outputs: int,
    inputs: int,
    block: int,
    block_of_scales: int,
    a: Tensor | None,
    b: Tensor | None,
    keys: Tensor | None,
    p: float,
    scale: float,
) -> list[Tensor]:
    """[dx], or [dx, dA, dB] with an adapter."""
    dy = dy.contiguous()
    dense = dense_weight(weight, four_bit, outputs, inputs, block, block_of_scales, dy.dtype)
    dx = dy @ dense
    if a is None or b is None or x is None or s is None:
        return [dx]
    scaled, update = _scaled(a, p, keys, scale, dy.dtype), Update(s, b.to(dy.dtype), (0,))
    ds, db = lora_output_grads(dy, update, [slice(0, b.shape[0])])
    da = lora_a_grad(ds, x, keys, p, _factor(p, keys, scale))
    return [lora_input_grad_(dx, ds, scaled, keys, p), da, db]


@_backward.register_fake
def _(
    dy: Tensor, x: Any, s: Any, weight: Any, four_bit: Any, outputs: int, inputs: int, block: int,
    block_of_scales: int, a: Any, b: Any, keys: Any, p: float, scale: float,
) -> list[Tensor]:  # fmt: skip
    dx = dy.new_empty(dy.shape[0], inputs)
    return [dx] if a is None else [dx, torch.empty_like(a), torch.empty_like(b)]


def _scaled(a: Tensor, p: float, keys: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    return (a * _factor(p, keys, scale)).to(dtype)


def _factor(p: float, keys: Tensor | None, scale: float) -> float:
    return scale / (1 - p) if keys is not None else scale


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, four_bit, *ctx.sizes, _, a, b, keys, ctx.p, ctx.scale = inputs
    adapted = a is not None
    ctx.count = len(four_bit)
    ctx.save_for_backward(
        x if adapted else None, output[1] if adapted else None, weight, a, b, keys, *four_bit
    )


def _gradient(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, s, weight, a, b, keys, *four_bit = ctx.saved_tensors
    dx, *factors = _backward(dy, x, s, weight, four_bit, *ctx.sizes, a, b, keys, ctx.p, ctx.scale)
    da, db = factors or (None, None)
    return (dx, None, [None] * ctx.count, *[None] * 5, da, db, None, None, None)


_forward.register_autograd(_gradient, setup_context=_save)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    four_bit: FourBit,
    outputs: int,
    inputs: int,
    block: int,
    block_of_scales: int,
    bias: Tensor | None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    keys: Tensor | None = None,
    p: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """A frozen linear layer of x [..., K] with its adapter: y [..., N].

    Args:
        x: in the dtype of the frozen weight.
        weight: [N, K]; None for an NF4 weight.
        four_bit: its tensors (`four_bit_parts`); empty for a 16-bit or 32-bit weight.
        outputs: N.
        inputs: K.
        block: NF4 values per scale; 0 if not NF4.
        block_of_scales: scales per second-level scale; 0 if not nested.
        a: [R, K] float32; None without an adapter.
        b: [N, R] float32.
        keys: [1, 2] int32 of the dropout mask (`ops/dropout_mask.py`); None for no dropout.
        p: dropout's probability.
        scale: alpha / r.
    """
    rows = x.reshape(-1, inputs)
    y, _ = _forward(
        rows, weight, four_bit, outputs, inputs, block, block_of_scales, bias, a, b, keys, p, scale
    )
    return y.view(*x.shape[:-1], outputs)
