"""A decoder layer of the Llama shape as one autograd node with a hand-written backward.

    mid = x + o(attention(rope(qkv(norm1(x)))))          out = mid + down(act(gate) * up)

`SavedActivations` selects the activations that are saved for backward; the others are recomputed.
Bytes per token and layer in bf16 at the Llama-2-7B shape: ALL 91 KiB, NO_GATE_UP 48, MIDDLE 16,
INPUT 8; `down` is never recomputed, nor is `o` while the middle is saved.
Shapes: B batch, T tokens, M = B*T, D model, H/Hk heads, d head width, I inner width.
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.engine.attention import Angles, Attended, LayerAttention, Segments, eps_of
from lorakit.engine.lora_linear import Dropout, FusedLoraLinear, Scratch, Unsupported
from lorakit.ops.glu import gated, gated_backward
from lorakit.ops.lora import Update, lora_down
from lorakit.ops.rms_norm import rms_norm, rms_norm_backward


class SavedActivations(enum.IntEnum):
    """Levels of activations that a layer saves for backward, most first."""

    ALL = 0
    NO_GATE_UP = 1
    MIDDLE = 2
    INPUT = 3


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Context that all layers share in one forward pass: angles, documents, masks, mode."""

    angles: Angles  # cos, sin [1 or B, T, d]
    segments: Segments | None
    keys: Tensor | None  # [layers, modules, 2]
    training: bool
    arena: ActivationBuffers | None = None
    first_row: int = 0  # of a chunk: its first row in the complete pass

    def chunk(self, rows: slice, batch: int) -> ForwardContext:
        """The context of these rows alone; several rows of a batch are not divided."""
        if batch > 1:
            return self
        cos, sin = self.angles
        return replace(self, angles=(cos[:, rows], sin[:, rows]), first_row=rows.start)


class ActivationBuffers:
    """Buffers of saved activations, in one allocation per kind.

    Separate allocations between short-lived tensors would fragment memory: 4 GiB with 32 layers at
    2,048 tokens.
    """

    def __init__(self, layers: list[FastLayer], rows: int, model: int, like: Tensor) -> None:
        first = layers[0]
        inner, qkv = first.gate_up.outputs, first.qkv.outputs
        saved_widths = {
            "out": [(x.number, model) for x in layers],
            "mid": [(x.number, model) for x in layers if x.keep < SavedActivations.INPUT],
            "qkv": [(x.number, qkv) for x in layers if x.keep < SavedActivations.MIDDLE],
            "gate_up": [(x.number, inner) for x in layers if x.keep == SavedActivations.ALL],
        }
        self.buffers: dict[tuple[str, int], Tensor] = {}
        for name, layer_widths in saved_widths.items():
            if layer_widths:
                width = layer_widths[0][1]
                stacked = torch.empty(
                    len(layer_widths), rows, width, dtype=like.dtype, device=like.device
                )
                # .data: each slice counts its own versions, so autograd ignores writes to others.
                self.buffers |= {(name, w[0]): stacked[i].data for i, w in enumerate(layer_widths)}

    def take(self, name: str, number: int) -> Tensor | None:
        """Return and remove the buffer of layer `number` for this tensor; None if not saved."""
        return self.buffers.pop((name, number), None)


@dataclass(slots=True)
class Saved:
    """Tensors that one layer's forward saves for its backward; None if recomputed."""

    x: Any  # [M, D]
    updates: dict[str, Update | None] = field(default_factory=dict)
    attention: Any = None  # Attended
    mid: Any = None  # [M, D]
    gate_up: Any = None  # [M, 2I], adapters not included


class FastLayer:
    """A decoder layer's modules as four groups of linear layers, two norms and its attention."""

    def __init__(
        self,
        layer: Any,
        number: int,
        config: Any,
        scratch: Scratch,
        device: torch.device | None = None,
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.number, self.keep = number, SavedActivations.ALL
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = FusedLoraLinear("qkv", inputs, scratch, device)
        self.o = FusedLoraLinear("o", [attention.o_proj], scratch, device)
        self.gate_up = FusedLoraLinear("gate_up", [mlp.gate_proj, mlp.up_proj], scratch, device)
        self.down = FusedLoraLinear("down", [mlp.down_proj], scratch, device)
        self.groups = [self.qkv, self.o, self.gate_up, self.down]
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.offset = 1.0 if config.model_type.startswith("gemma") else 0.0
        self.attention = LayerAttention(attention, self.qkv.sizes, config, self.offset)
        for norm in (*self.norms, *self.attention.norms):
            if norm is not None and norm.weight.requires_grad:
                raise Unsupported("norm weights train")
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in _ACTIVATIONS:
            raise Unsupported(f"activation {name}")
        self.activation = _ACTIVATIONS[name]
        starts = [0]
        for group in self.groups:
            starts.append(starts[-1] + len(group.adapted))
        self.key_rows = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self.masks = starts[-1]

    def __call__(self, x: Tensor, call: ForwardContext) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        parameters = [p for group in self.groups for p in group.parameters]
        out: Tensor = _Layer.apply(x, self, call, *parameters)
        return out

    def dropout(self, group: FusedLoraLinear, call: ForwardContext) -> Dropout:
        if call.keys is None or not call.training or not group.p or not group.adapted:
            return Dropout(None, 0.0)
        keys = call.keys[self.number, self.key_rows[self.groups.index(group)]]
        if call.first_row:
            # Element i of row n is element n * K + i of the complete mask.
            shift = call.first_row * group.inputs & 0xFFFFFFFF
            keys = keys.clone()
            keys[:, 0] += shift - 2**32 if shift >= 2**31 else shift
        return Dropout(keys, group.p)

    def buffer(self, name: str, call: ForwardContext) -> Tensor | None:
        return call.arena.take(name, self.number) if call.arena else None

    def norm(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        module = self.norms[index]
        return rms_norm(x, module.weight, eps_of(module), self.offset)


class _Layer(torch.autograd.Function):
    """The layer as one node: forward saves by `SavedActivations`, backward recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FastLayer, call: ForwardContext, *parameters: Tensor
    ) -> Tensor:
        wants = any(ctx.needs_input_grad)
        with torch.autocast(x.device.type, enabled=False):
            saved = Saved(x.reshape(-1, x.shape[-1]))
            out = _forward(layer, call, saved, x.shape[0], wants)
        if wants:
            ctx.layer, ctx.call, ctx.saved, ctx.shape = layer, call, saved, x.shape
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        with torch.autocast(dout.device.type, enabled=False):
            dx, gradients = _backward(
                ctx.layer, ctx.call, ctx.saved, ctx.shape, dout.reshape(-1, ctx.shape[-1]),
                ctx.needs_input_grad[0],
            )  # fmt: skip
        # The graph's nodes outlive their backward: only this releases memory layer by layer.
        ctx.saved = None
        return (dx.view(ctx.shape) if dx is not None else None, None, None, *gradients)


class Weights:
    """Frozen weights of one layer in one pass; NF4 weights are dequantized at most once."""

    def __init__(self, layer: FastLayer) -> None:
        self.layer = layer
        self.known: dict[str, Tensor] = {}

    def __getitem__(self, group: FusedLoraLinear) -> Tensor:
        if group.name not in self.known:
            self.known[group.name] = group.weight()
        return self.known[group.name]


def _forward(
    layer: FastLayer, call: ForwardContext, saved: Saved, batch: int, wants: bool
) -> Tensor:
    """The layer's output [M, D]; `saved` holds the activations selected by `layer.keep`."""
    keep, weights = layer.keep, Weights(layer)
    saved.attention = _attend(
        layer, call, saved, weights, batch, wants and keep < SavedActivations.MIDDLE
    )
    mid = to_middle(layer, call, saved, weights, as_rows(saved.attention.out))
    out_buffer = layer.buffer("out", call)
    out = from_middle(layer, call, saved, weights, mid, out_buffer)
    if keep != SavedActivations.ALL:
        saved.gate_up = None
        del saved.updates["gate_up"]
    if keep >= SavedActivations.MIDDLE:
        saved.attention = None
        del saved.updates["qkv"]
    if keep < SavedActivations.INPUT:
        saved.mid = mid
    else:
        del saved.updates["o"]
    return out


def to_qkv(
    layer: FastLayer,
    call: ForwardContext,
    saved: Saved,
    weights: Weights,
    out: Tensor | None = None,
) -> Tensor:
    """qkv [M, N] ready for attention; the adapters' low-rank input is in `saved.updates`."""
    h1, _ = layer.norm(0, saved.x)
    drop = layer.dropout(layer.qkv, call)
    qkv, saved.updates["qkv"] = layer.qkv.forward(h1, weights[layer.qkv], drop, out)
    layer.attention.prepare_(qkv, saved.updates["qkv"], call.angles)
    return qkv


def _attend(
    layer: FastLayer, call: ForwardContext, saved: Saved, weights: Weights, batch: int, graph: bool
) -> Attended:
    qkv = to_qkv(layer, call, saved, weights, layer.buffer("qkv", call))
    return layer.attention.attend(qkv, call.angles, call.segments, batch, graph)


def to_middle(
    layer: FastLayer, call: ForwardContext, saved: Saved, weights: Weights, attended: Tensor
) -> Tensor:
    """The middle [M, D] from attention's output [M, H*d]."""
    drop, buffer = layer.dropout(layer.o, call), layer.buffer("mid", call)
    mid, saved.updates["o"] = layer.o.forward_residual(
        attended, weights[layer.o], drop, saved.x, buffer
    )
    return mid


def from_middle(
    layer: FastLayer,
    call: ForwardContext,
    saved: Saved,
    weights: Weights,
    mid: Tensor,
    out: Tensor | None,
) -> Tensor:
    """The layer's output [M, D]; gate/up and the updates are in `saved`."""
    h2, _ = layer.norm(1, mid)
    saved.gate_up = _to_gate_up(layer, call, saved, weights, h2)
    h = gated(saved.gate_up, layer.activation, saved.updates["gate_up"])
    if layer.keep != SavedActivations.ALL:
        saved.gate_up = None
    del h2
    drop = layer.dropout(layer.down, call)
    out, saved.updates["down"] = layer.down.forward_residual(h, weights[layer.down], drop, mid, out)
    return out


def _to_gate_up(
    layer: FastLayer, call: ForwardContext, saved: Saved, weights: Weights, h2: Tensor
) -> Tensor:
    """gate/up [M, 2I] without the adapters' update, which is stored in `saved.updates`."""
    drop = layer.dropout(layer.gate_up, call)
    buffer = layer.buffer("gate_up", call)
    gate_up, saved.updates["gate_up"] = layer.gate_up.forward(
        h2, weights[layer.gate_up], drop, buffer
    )
    return gate_up


def _backward(
    layer: FastLayer, call: ForwardContext, saved: Saved, shape: Any, dout: Tensor, wants_dx: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx [M, D], gradients of the groups' parameters in their order)."""
    weights = Weights(layer)
    if saved.attention is None:
        saved.attention = _attend(layer, call, saved, weights, shape[0], graph=True)
    attended = as_rows(saved.attention.out)
    if saved.mid is None:
        saved.mid = to_middle(layer, call, saved, weights, attended)
    dmid, of_mlp = backward_mlp(layer, call, saved, weights, dout)
    dattended, of_o = backward_o(layer, call, saved, weights, attended, dmid)
    dattended = dattended.view(saved.attention.out.shape)
    del attended
    dqkv = layer.attention.backward(saved.attention, dattended, call.angles)
    saved.attention = None
    dx, of_qkv = backward_qkv(layer, call, saved, weights, dqkv, dmid, wants_dx)
    return dx, [*of_qkv, *of_o, *of_mlp]


def backward_mlp(
    layer: FastLayer, call: ForwardContext, saved: Saved, weights: Weights, dout: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """(dmid [M, D], gradients of gate/up and down).

    Without a saved update of `down`, its low-rank input is computed from the recomputed h.
    """
    mid, down, training = saved.mid, layer.down, call.training
    h2, rstd2 = layer.norm(1, mid)
    gate_up = saved.gate_up
    if gate_up is None:
        gate_up = _to_gate_up(layer, call, saved, weights, h2)
    update = saved.updates["gate_up"]
    drop = layer.dropout(down, call)
    forgotten = "down" not in saved.updates
    if forgotten:
        ds, db = down.s_grad(dout), None
    else:
        ds, db = down.output_grads(dout, saved.updates["down"])
    dh, extra = dout @ weights[down], down.to_input_grad(ds, drop)
    dgate_up, h = gated_backward(dh, gate_up, layer.activation, update, extra)
    saved.gate_up = gate_up = None
    del dh, extra
    if forgotten:
        down.b_grad(dout, lora_down(h, down.a, drop.keys, drop.p))
    of_down = down.factor_grads(ds, db, h, drop, training)
    del h
    drop = layer.dropout(layer.gate_up, call)
    ds, db = layer.gate_up.output_grads(dgate_up, update)
    dh2 = layer.gate_up.input_grad(dgate_up, ds, weights[layer.gate_up], drop)
    of_gate_up = layer.gate_up.factor_grads(ds, db, h2, drop, training)
    del dgate_up
    norm = layer.norms[1]
    dmid = rms_norm_backward(dh2, mid, norm.weight, rstd2, layer.offset, residual=dout)
    return dmid, [*of_gate_up, *of_down]


def backward_o(
    layer: FastLayer,
    call: ForwardContext,
    saved: Saved,
    weights: Weights,
    attended: Tensor,
    dmid: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """(the gradient of attention's output [M, H*d], gradients of o)."""
    drop = layer.dropout(layer.o, call)
    ds, db = layer.o.output_grads(dmid, saved.updates["o"])
    dattended = layer.o.input_grad(dmid, ds, weights[layer.o], drop)
    return dattended, layer.o.factor_grads(ds, db, attended, drop, call.training)


def backward_qkv(
    layer: FastLayer,
    call: ForwardContext,
    saved: Saved,
    weights: Weights,
    dqkv: Tensor,
    dmid: Tensor,
    wants_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx [M, D], gradients of qkv)."""
    h1, rstd1 = layer.norm(0, saved.x)
    drop = layer.dropout(layer.qkv, call)
    ds, db = layer.qkv.output_grads(dqkv, saved.updates["qkv"])
    dx = None
    if wants_dx:
        dh1 = layer.qkv.input_grad(dqkv, ds, weights[layer.qkv], drop)
        norm = layer.norms[0]
        dx = rms_norm_backward(dh1, saved.x, norm.weight, rstd1, layer.offset, residual=dmid)
    return dx, layer.qkv.factor_grads(ds, db, h1, drop, call.training)


def as_rows(out: Tensor) -> Tensor:
    """Attention's output [B, T, H, d] as rows [M, H*d]."""
    return out.detach().reshape(out.shape[0] * out.shape[1], -1)


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
