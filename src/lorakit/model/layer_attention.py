"""One layer's qkv enters; rotated queries and keys attend, all heads at once or some; out leaves.

Shapes: B batch, T tokens, M = B*T, H query heads on Hk key heads, d wide; qkv [M, (H + 2 Hk) d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.model.attention import Segments, attend
from lorakit.ops.lora import Update
from lorakit.ops.rms_norm import rms_norm, rms_norm_backward
from lorakit.ops.rope import rope, rotate_qkv_, unrotate_qkv

Angles = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Attended:
    """Attention as a graph of its own: leaves, and the output [B, T, H, d] that leads back."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    raw: tuple[Tensor, Tensor] | None = None  # q and k before their norms (Qwen3)


class LayerAttention:
    """Rotation, norms of heads and attention of one layer; its projections are `LoraGroup`s."""

    def __init__(self, module: Any, sizes: list[int], config: Any, offset: float) -> None:
        self.head, self.scale, self.offset = module.head_dim, module.scaling, offset
        self.heads = tuple(size // self.head for size in sizes)
        self.norms: list[Any] = [getattr(module, n, None) for n in ("q_norm", "k_norm")]
        self.rotates = bool(getattr(module, "use_rope", True))
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        self.window: int | None = int(window) if window else None

    def prepare_(self, qkv: Tensor, update: Update | None, angles: Angles) -> None:
        """Add the adapters' part to qkv and rotate q and k, in place; before norms only the first.

        Args:
            angles: (cos, sin) [1 or B, T, d] of these rows.
        """
        turns = angles if self.rotates and self.norms[0] is None else None
        rotate_qkv_(qkv, self.heads, self.head, turns, update)

    def columns(self, keys: slice) -> list[slice]:
        """Heads of q, k and v that belong to these key heads, counted over qkv."""
        queries, own, _ = self.heads
        share = queries // own
        first, last, _ = keys.indices(own)
        return [
            slice(first * share, last * share),
            slice(queries + first, queries + last),
            slice(queries + own + first, queries + own + last),
        ]

    def attend(
        self,
        qkv: Tensor,
        angles: Angles,
        segments: Segments | None,
        batch: int,
        graph: bool,
        keys: slice = slice(None),
    ) -> Attended:
        """Causal attention of a prepared qkv; with `graph` a backward can follow."""
        wide = qkv.view(batch, -1, sum(self.heads), self.head)
        q, k, v = (wide[:, :, own] for own in self.columns(keys))
        raw = None
        if self.norms[0] is not None:
            raw = (q, k)
            q, k = (self._norm(n, t) for n, t in enumerate(raw))
            if self.rotates:
                q, k = rope(q, *angles, out=q), rope(k, *angles, out=k)
        with torch.set_grad_enabled(graph):
            if graph:
                # .data: a group of heads done with may be overwritten while others wait (autograd
                # would see one tensor written).
                q, k, v = (t.data.requires_grad_() for t in (q, k, v))
            out = attend(q, k, v, self.scale, segments)
        return Attended(q, k, v, out, raw)

    def backward(self, kept: Attended, dout: Tensor, angles: Angles) -> Tensor:
        """The gradient of qkv as it was before `prepare_`, of the heads in `kept` side by side.

        Args:
            dout: gradient of the output [B, T, heads, d].
        """
        dq, dk, dv = torch.autograd.grad(kept.out, (kept.q, kept.k, kept.v), dout)
        dqkv = unrotate_qkv(dq, dk, dv, angles if self.rotates else None)
        if kept.raw is not None:
            wide = dqkv.view(*dq.shape[:2], -1, self.head)
            parts = wide.split([t.shape[2] for t in (dq, dk, dv)], dim=2)
            for number, own in enumerate(kept.raw):
                parts[number].copy_(self._norm_backward(number, parts[number], own))
        return dqkv

    def _norm(self, number: int, t: Tensor) -> Tensor:
        module = self.norms[number]
        flat = t.reshape(-1, self.head)
        return rms_norm(flat, module.weight, eps_of(module), self.offset)[0].view(t.shape)

    def _norm_backward(self, number: int, grad: Tensor, raw: Tensor) -> Tensor:
        module = self.norms[number]
        x = raw.reshape(-1, self.head)
        rstd = torch.rsqrt(x.float().pow(2).mean(-1) + eps_of(module))
        flat = grad.reshape(-1, self.head)
        return rms_norm_backward(flat, x, module.weight, rstd, self.offset).view(grad.shape)


def eps_of(norm: Any) -> float:
    """The epsilon of an RMS norm module, by either of its names."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
