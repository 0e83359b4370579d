"""Forward and backward of a decoder layer without autograd, in chunks of tokens and heads.

The operations are those of `engine/decoder_layer.py`, for a schedule that keeps only each layer's
input. Tokens pass through the projections and the MLP in chunks, heads through attention in groups.
Besides x and its gradient, memory holds qkv, attention's output and its gradient for all tokens
(28 kB per token at 4,096 wide, 32 heads on 8) and everything else for one chunk. Sums over tokens
accumulate chunk by chunk; dropout masks equal those of the unchunked layer, because the row number
is part of their hash. Gradients are added to the groups' buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.engine.attention import Angles, Attended
from lorakit.engine.decoder_layer import FastLayer, ForwardContext, Weights, as_rows
from lorakit.engine.lora_linear import Dropout, FusedLoraLinear
from lorakit.ops.glu import gated, gated_backward
from lorakit.ops.lora import Update, lora_down
from lorakit.ops.rms_norm import rms_norm_backward


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """Tokens of one long row, and key heads, that pass through a layer at once.

    Several rows (B > 1) are not split: positions restart in each row.
    """

    tokens: int
    heads: int

    def rows(self, x: Tensor, batch: int) -> Iterator[slice]:
        """Slices of the rows of x [M, D]."""
        size = self.tokens if batch == 1 else x.shape[0]
        for start in range(0, x.shape[0], size):
            yield slice(start, min(start + size, x.shape[0]))

    def head_groups(self, layer: FastLayer) -> list[slice]:
        """Slices of the key heads."""
        count = layer.attention.heads[1]
        return [slice(i, min(i + self.heads, count)) for i in range(0, count, self.heads)]


@dataclass(frozen=True, slots=True)
class LayerTask:
    """One micro-batch in one layer: the layer, the pass's context, rows, weights and chunk size."""

    layer: FastLayer
    call: ForwardContext
    batch: int
    weights: Weights
    cut: ChunkSize

    def drop(self, group: FusedLoraLinear, rows: slice) -> Dropout:
        """Dropout of these rows: element i of row n is element n * K + i of the complete mask."""
        complete = self.layer.dropout(group, self.call)
        if complete.keys is None or not rows.start:
            return complete
        shift = rows.start * group.inputs & 0xFFFFFFFF
        keys = complete.keys.clone()
        keys[:, 0] += shift - 2**32 if shift >= 2**31 else shift
        return Dropout(keys, complete.p)

    def angles(self, rows: slice) -> Angles:
        """cos and sin of these rows."""
        cos, sin = self.call.angles
        return (cos, sin) if self.batch > 1 else (cos[:, rows], sin[:, rows])


def forward(work: LayerTask, x: Tensor) -> Tensor:
    """The layer's output [M, D]."""
    layer, weights = work.layer, work.weights
    qkv, _ = _qkv(work, x)
    flat = _attend_in_place(work, qkv)
    out = torch.empty_like(x)
    for rows in work.cut.rows(x, work.batch):
        drop = work.drop(layer.o, rows)
        mid, _ = layer.o.forward_residual(flat[rows], weights[layer.o], drop, x[rows])
        h2, _ = layer.norm(1, mid)
        drop = work.drop(layer.gate_up, rows)
        gate_up, update = layer.gate_up.forward(h2, weights[layer.gate_up], drop)
        h = gated(gate_up, layer.activation, update)
        del gate_up, h2
        layer.down.forward_residual(
            h, weights[layer.down], work.drop(layer.down, rows), mid, out[rows]
        )
    return out


def backward(work: LayerTask, x: Tensor, d: Tensor, wants_dx: bool) -> None:
    """Add the layer's gradients to its buffers, and overwrite d [M, D] by the gradient of x.

    Args:
        x: the layer's input.
        d: the gradient of its output; its content is undefined if `wants_dx` is false.
    """
    layer = work.layer
    qkv, s = _qkv(work, x)
    with torch.enable_grad():
        kept = [
            layer.attention.attend(
                qkv, work.call.angles, work.call.segments, work.batch, True, heads
            )
            for heads in work.cut.head_groups(layer)
        ]
    dflat = torch.empty(x.shape[0], layer.o.inputs, dtype=x.dtype, device=x.device)
    for rows in work.cut.rows(x, work.batch):
        _backward_mlp(work, rows, x[rows], _gather(work, kept, rows), d[rows], dflat[rows])
    dqkv = _backward_attention(work, qkv, kept, dflat)
    del kept, dflat
    for rows in work.cut.rows(x, work.batch):
        _backward_qkv(work, rows, x[rows], dqkv[rows], s, d[rows], wants_dx)


def _qkv(work: LayerTask, x: Tensor) -> tuple[Tensor, Update | None]:
    """(qkv [M, N] ready for attention, low-rank inputs of its adapters for all rows)."""
    layer = work.layer
    qkv = torch.empty(x.shape[0], layer.qkv.outputs, dtype=x.dtype, device=x.device)
    updates = []
    for rows in work.cut.rows(x, work.batch):
        h1, _ = layer.norm(0, x[rows])
        drop, weight = work.drop(layer.qkv, rows), work.weights[layer.qkv]
        _, update = layer.qkv.forward(h1, weight, drop, qkv[rows])
        layer.attention.prepare_(qkv[rows], update, work.angles(rows))
        updates.append(update)
    present = [u for u in updates if u is not None]
    if not present:
        return qkv, None
    s = present[0].s if len(present) == 1 else torch.cat([u.s for u in present])
    return qkv, Update(s, present[0].b, present[0].slots)


def _attend_in_place(work: LayerTask, qkv: Tensor) -> Tensor:
    """Attention's output [M, H*d]; with several groups of heads it overwrites their queries."""
    attention, groups = work.layer.attention, work.cut.head_groups(work.layer)
    angles, segments, batch = work.call.angles, work.call.segments, work.batch
    if len(groups) == 1:
        return as_rows(attention.attend(qkv, angles, segments, batch, False).out)
    by_head = qkv.view(batch, -1, sum(attention.heads), attention.head)
    for heads in groups:
        attended = attention.attend(qkv, angles, segments, batch, False, heads)
        by_head[:, :, attention.columns(heads)[0]].copy_(attended.out)
    return qkv[:, : work.layer.o.inputs]


def _gather(work: LayerTask, kept: list[Attended], rows: slice) -> Tensor:
    """Concatenate attention's output of these rows [n, H*d] from all groups of heads."""
    outputs = [
        as_rows(attended.out if work.batch > 1 else attended.out[:, rows]) for attended in kept
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _backward_mlp(
    work: LayerTask, rows: slice, x: Tensor, flat: Tensor, d: Tensor, dflat: Tensor
) -> None:
    """Turn d of the output into d of the middle, in place; write d of attention's output."""
    layer, weights, training = work.layer, work.weights, work.call.training
    down, gate_up, o = layer.down, layer.gate_up, layer.o
    mid, of_o = o.forward_residual(flat, weights[o], work.drop(o, rows), x)
    h2, rstd2 = layer.norm(1, mid)
    drop = work.drop(gate_up, rows)
    gate_up_out, of_gate_up = gate_up.forward(h2, weights[gate_up], drop)
    ds = down.s_grad(d)
    dh, drop_down = d @ weights[down], work.drop(down, rows)
    extra = down.to_input_grad(ds, drop_down)
    dgate_up, h = gated_backward(dh, gate_up_out, layer.activation, of_gate_up, extra)
    del gate_up_out, dh
    down.b_grad(d, lora_down(h, down.a, drop_down.keys, drop_down.p))
    down.factor_grads(ds, None, h, drop_down, training)
    del h
    ds, _ = gate_up.output_grads(dgate_up, of_gate_up)
    dh2 = gate_up.input_grad(dgate_up, ds, weights[gate_up], drop)
    gate_up.factor_grads(ds, None, h2, drop, training)
    del dgate_up
    norm = layer.norms[1]
    dmid = rms_norm_backward(dh2, mid, norm.weight, rstd2, layer.offset, residual=d)
    ds, _ = o.output_grads(dmid, of_o)
    drop = work.drop(o, rows)
    dflat.copy_(o.input_grad(dmid, ds, weights[o], drop))
    o.factor_grads(ds, None, flat, drop, training)
    d.copy_(dmid)


def _backward_attention(
    work: LayerTask, qkv: Tensor, kept: list[Attended], dflat: Tensor
) -> Tensor:
    """The gradient of qkv [M, N]; with several groups of heads it overwrites qkv."""
    attention, angles = work.layer.attention, work.call.angles
    if len(kept) == 1:
        return attention.backward(kept[0], dflat.view(kept[0].out.shape), angles)
    width = attention.head
    by_head, dflat_by_head = (
        t.view(work.batch, -1, t.shape[1] // width, width) for t in (qkv, dflat)
    )
    for heads in work.cut.head_groups(work.layer):
        attended, columns = kept.pop(0), attention.columns(heads)
        grad = attention.backward(attended, dflat_by_head[:, :, columns[0]], angles)
        column_grads = grad.view(work.batch, -1, grad.shape[1] // width, width).split(
            [c.stop - c.start for c in columns], dim=2
        )
        for column, column_grad in zip(columns, column_grads, strict=True):
            by_head[:, :, column].copy_(column_grad)
    return qkv


def _backward_qkv(
    work: LayerTask,
    rows: slice,
    x: Tensor,
    dqkv: Tensor,
    s: Update | None,
    d: Tensor,
    wants_dx: bool,
) -> None:
    """Turn d of qkv, and of the middle in `d`, into d of x, in place."""
    layer, group = work.layer, work.layer.qkv
    h1, rstd1 = layer.norm(0, x)
    drop = work.drop(group, rows)
    update = Update(s.s[rows], s.b, s.slots) if s is not None else None
    ds, _ = group.output_grads(dqkv, update)
    if wants_dx:
        dh1 = group.input_grad(dqkv, ds, work.weights[group], drop)
        weight = layer.norms[0].weight
        d.copy_(rms_norm_backward(dh1, x, weight, rstd1, layer.offset, residual=d))
    group.factor_grads(ds, None, h1, drop, work.call.training)
