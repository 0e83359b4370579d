"""Queries, keys and values enter; causal attention leaves, over rows or over packed documents.

A dense batch goes through torch's scaled_dot_product_attention, which on a Hopper card is cuDNN's
kernel (0.084 ms forward for 2,048 tokens and 32 heads; FlashAttention-2 0.202 ms). Packed documents
go through torch's variable-length FlashAttention-2 where the card has it, else one by one.
Right-padded rows need no mask: a real token never looks to its right, and pads carry no loss.
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

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class Segments:
    """Borders of the documents in one packed row: cumulative lengths [n+1] int32, and the longest.

    `lengths` are the same on the host, for the path without a variable-length kernel.
    """

    borders: Tensor
    longest: int
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls, borders: Tensor | None, lengths: tuple[int, ...] = (), longest: int | None = None
    ) -> Segments | None:
        """The documents of a micro-batch (`data/batch.py`); None where rows are not packed."""
        if borders is None:
            return None
        return cls(borders, longest or max(lengths), tuple(lengths))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None) -> Tensor:
    """Causal attention; q [B, T, H, d], k and v [B, T, Hk, d] -> [B, T, H, d].

    Args:
        segments: set when the one row (B = 1) holds several documents, each to see only itself.
    """
    if segments is None:
        return _dense(q, k, v, scale)
    if has_matrix_kernels(q) and q.dtype != torch.float32 and q.shape[-1] <= 256:
        return _varlen(q, k, v, scale, segments)
    parts = zip(*(t.split(segments.lengths, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([_dense(a, b, c, scale) for a, b, c in parts], dim=1)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    if grouped and not has_matrix_kernels(q):
        # Only the newer kernels share keys among heads; the others would fall back to full scores.
        repeat = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
        grouped = False
    # cuDNN plans anew for every length it meets; those that are no multiple of 128 are left out.
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


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale}
    # torch 2.10 spells causality is_causal; 2.11 and later give a window.
    options |= {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    if "enable_gqa" in accepted:
        options["enable_gqa"] = q.shape[2] != k.shape[2]
    elif q.shape[2] != k.shape[2]:
        repeat = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    borders, longest = segments.borders, segments.longest
    out: Any = varlen_attn(q[0], k[0], v[0], borders, borders, longest, longest, **options)
    packed: Tensor = out.unsqueeze(0)
    return packed
