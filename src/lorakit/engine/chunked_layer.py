"""Forward and backward of a decoder layer without autograd, in chunks of tokens and heads.

The parts of `engine/decoder_layer.py`, for a schedule that keeps only each layer's input. Tokens
pass through the projections and the MLP in chunks, heads through attention in groups. Besides x and
its gradient, memory holds qkv, attention's output and its gradient for all tokens (28 kB per token
at 4,096 wide, 32 heads on 8) and everything else for one chunk. Sums over tokens accumulate chunk
by chunk; dropout masks equal those of the unchunked layer, because the row number is part of their
hash. Gradients are added to the groups' buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.engine.attention import Attended
from lorakit.engine.decoder_layer import (
    FastLayer,
    ForwardContext,
    Saved,
    Weights,
    as_rows,
    backward_mlp,
    backward_o,
    backward_qkv,
    from_middle,
    to_middle,
    to_qkv,
)
from lorakit.ops.lora import Update


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

    def chunks(self, x: Tensor) -> Iterator[tuple[slice, ForwardContext, Saved]]:
        """Rows of x [M, D], their context, and their saved activations: the input."""
        for rows in self.cut.rows(x, self.batch):
            yield rows, self.call.chunk(rows, self.batch), Saved(x[rows])


def forward(work: LayerTask, x: Tensor) -> Tensor:
    """The layer's output [M, D]."""
    layer, weights = work.layer, work.weights
    qkv, _ = _qkv(work, x)
    flat = _attend_in_place(work, qkv)
    out = torch.empty_like(x)
    for rows, call, saved in work.chunks(x):
        mid = to_middle(layer, call, saved, weights, flat[rows])
        from_middle(layer, call, saved, weights, mid, out[rows])
    return out


def backward(work: LayerTask, x: Tensor, d: Tensor, wants_dx: bool) -> None:
    """Add the layer's gradients to its buffers, and overwrite d [M, D] by the gradient of x.

    Args:
        x: the layer's input.
        d: the gradient of its output; its content is undefined if `wants_dx` is false.
    """
    layer, weights, whole = work.layer, work.weights, work.call
    qkv, s = _qkv(work, x)
    kept = [
        layer.attention.attend(qkv, whole.angles, whole.segments, work.batch, True, heads)
        for heads in work.cut.head_groups(layer)
    ]
    dflat = torch.empty(x.shape[0], layer.o.inputs, dtype=x.dtype, device=x.device)
    for rows, call, saved in work.chunks(x):
        flat = _gather(work, kept, rows)
        saved.mid = to_middle(layer, call, saved, weights, flat)
        dmid, _ = backward_mlp(layer, call, saved, weights, d[rows])
        d[rows].copy_(dmid)
        dflat[rows].copy_(backward_o(layer, call, saved, weights, flat, dmid)[0])
    dqkv = _backward_attention(work, qkv, kept, dflat)
    del kept, dflat
    for rows, call, saved in work.chunks(x):
        saved.updates["qkv"] = Update(s.s[rows], s.b, s.slots) if s is not None else None
        dx, _ = backward_qkv(layer, call, saved, weights, dqkv[rows], d[rows], wants_dx)
        if dx is not None:
            d[rows].copy_(dx)


def _qkv(work: LayerTask, x: Tensor) -> tuple[Tensor, Update | None]:
    """(qkv [M, N] ready for attention, low-rank inputs of its adapters for all rows)."""
    layer = work.layer
    qkv = torch.empty(x.shape[0], layer.qkv.outputs, dtype=x.dtype, device=x.device)
    updates = []
    for rows, call, saved in work.chunks(x):
        to_qkv(layer, call, saved, work.weights, qkv[rows])
        updates.append(saved.updates["qkv"])
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
