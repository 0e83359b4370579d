"""Causal attention over rows or packed documents, and the attention of one decoder layer.

A dense batch uses torch's scaled_dot_product_attention, which on Hopper is cuDNN's kernel (0.084 ms
forward for 2,048 tokens and 32 heads; FlashAttention-2 0.202 ms). Packed documents use torch's
variable-length FlashAttention-2 if the GPU supports it, else attend one by one. Right-padded rows
need no mask: real tokens do not attend to their right, and padding has no loss.

`LayerAttention` rotates and attends one layer's qkv, with all heads at once or in groups.

Shapes: B batch, T tokens, M = B*T, H query heads on Hk key heads, d wide; qkv [M, (H + 2 Hk) d].
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorakit.ops.backend import has_matrix_kernels
from lorakit.ops.lora import Update
from lorakit.ops.rms_norm import rms_norm, rms_norm_backward
from lorakit.ops.rope import rope, rotate_qkv_, unrotate_qkv

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class Segments:
    """Borders of the documents in one packed row: cumulative lengths [n+1] int32, and the longest.

    `lengths` are the documents' lengths on the host, for the path without a varlen kernel.
    """

    borders: Tensor
    longest: int
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls, borders: Tensor | None, lengths: tuple[int, ...] = (), longest: int | None = None
    ) -> Segments | None:
        """The documents of a micro-batch (`data/batching.py`); None if rows are not packed."""
        if borders is None:
            return None
        return cls(borders, longest or max(lengths), tuple(lengths))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """Causal attention; q [B, T, H, d], k and v [B, T, Hk, d] -> [B, T, H, d].

    Args:
        segments: set if the one row (B = 1) holds several documents, which are isolated.
    """
    if segments is None:
        return _dense(q, k, v, scale)
    if has_matrix_kernels(q) and q.dtype != torch.float32 and q.shape[-1] <= 256:
        packed = varlen(q[0], k[0], v[0], scale, segments.borders, segments.longest)
        return packed.unsqueeze(0)
    documents = zip(*(t.split(segments.lengths, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([_dense(a, b, c, scale) for a, b, c in documents], dim=1)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    if grouped and not has_matrix_kernels(q):
        # Only the newer kernels share keys among heads; others would compute full scores.
        repeat = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
        grouped = False
    # cuDNN plans again for every length; lengths that are not a multiple of 128 avoid it.
    odd = has_matrix_kernels(q) and q.shape[1] % 128
    with sdpa_kernel(_WITHOUT_CUDNN) if odd else nullcontext():
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=scale,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2)


def _accepted() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_ACCEPTED = _accepted()
# torch 2.10's varlen attention is causal or not, without a window.
HAS_WINDOWS = "window_size" in _ACCEPTED


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    borders: Tensor,
    longest: int,
    window: int | None = None,
) -> Tensor:
    """Causal attention within documents by FlashAttention-2; [tokens, heads, d].

    Args:
        borders: cumulative lengths [n + 1] int32 of the documents.
        longest: length of the longest document.
        window: tokens that each token attends to, itself included; needs `HAS_WINDOWS`.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale}
    if HAS_WINDOWS:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in _ACCEPTED:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    out: Any = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    attended: Tensor = out
    return attended


Angles = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Attended:
    """Attention as a separate autograd graph: its leaves, and the output [B, T, H, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    raw: tuple[Tensor, Tensor] | None = None  # q and k before their norms (Qwen3)


class LayerAttention:
    """Rotation, head norms and attention of one layer; `FusedLoraLinear`s do its projections."""

    def __init__(self, module: Any, sizes: list[int], config: Any, offset: float) -> None:
        self.head, self.scale, self.offset = module.head_dim, module.scaling, offset
        self.heads = tuple(size // self.head for size in sizes)
        self.norms: list[Any] = [getattr(module, n, None) for n in ("q_norm", "k_norm")]
        self.rotates = bool(getattr(module, "use_rope", True))
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        self.window: int | None = int(window) if window else None

    def prepare_(self, qkv: Tensor, update: Update | None, angles: Angles) -> None:
        """Add the adapters' update to qkv and rotate q and k in place; before norms only add.

        Args:
            angles: (cos, sin) [1 or B, T, d] of these rows.
        """
        rotation = angles if self.rotates and self.norms[0] is None else None
        rotate_qkv_(qkv, self.heads, self.head, rotation, update)

    def columns(self, keys: slice) -> list[slice]:
        """Heads of q, k and v that belong to these key heads, as slices over qkv."""
        queries, key_heads, _ = self.heads
        share = queries // key_heads
        first, last, _ = keys.indices(key_heads)
        return [
            slice(first * share, last * share),
            slice(queries + first, queries + last),
            slice(queries + key_heads + first, queries + key_heads + last),
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
        """Causal attention of a prepared qkv; `graph` makes a backward possible."""
        by_head = qkv.view(batch, -1, sum(self.heads), self.head)
        q, k, v = (by_head[:, :, columns] for columns in self.columns(keys))
        raw = None
        if self.norms[0] is not None:
            raw = (q, k)
            q, k = (self._norm(n, t) for n, t in enumerate(raw))
            if self.rotates:
                q, k = rope(q, *angles, out=q), rope(k, *angles, out=k)
        with torch.set_grad_enabled(graph):
            if graph:
                # .data: a finished group of heads may be overwritten while others wait (autograd
                # would detect a write to the shared tensor).
                q, k, v = (t.data.requires_grad_() for t in (q, k, v))
            out = attend(q, k, v, self.scale, segments)
        return Attended(q, k, v, out, raw)

    def backward(self, kept: Attended, dout: Tensor, angles: Angles) -> Tensor:
        """The gradient of qkv before `prepare_`, for the concatenated heads in `kept`.

        Args:
            dout: gradient of the output [B, T, heads, d].
        """
        dq, dk, dv = torch.autograd.grad(kept.out, (kept.q, kept.k, kept.v), dout)
        dqkv = unrotate_qkv(dq, dk, dv, angles if self.rotates else None)
        if kept.raw is not None:
            by_head = dqkv.view(*dq.shape[:2], -1, self.head)
            parts = by_head.split([t.shape[2] for t in (dq, dk, dv)], dim=2)
            for index, raw in enumerate(kept.raw):
                parts[index].copy_(self._norm_backward(index, parts[index], raw))
        return dqkv

    def _norm(self, index: int, t: Tensor) -> Tensor:
        module = self.norms[index]
        flat = t.reshape(-1, self.head)
        return rms_norm(flat, module.weight, eps_of(module), self.offset)[0].view(t.shape)

    def _norm_backward(self, index: int, grad: Tensor, raw: Tensor) -> Tensor:
        module = self.norms[index]
        x = raw.reshape(-1, self.head)
        rstd = torch.rsqrt(x.float().pow(2).mean(-1) + eps_of(module))
        flat = grad.reshape(-1, self.head)
        return rms_norm_backward(flat, x, module.weight, rstd, self.offset).view(grad.shape)


def eps_of(norm: Any) -> float:
    """The epsilon of an RMS norm module, under either attribute name."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
