"""Chunks of the gated delta rule, and the tensors that its forward keeps for the backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
EPS = 1e-6


class DeltaRuleSaved(NamedTuple):
    """Tensors for the backward.

    Attributes:
        q, k: normalized, in the input's dtype; q times the scale.
        norms: 1 / norm of q and of k, float32 [2, B, T, Hk].
        gates: G, beta, e and f, float32 [4, B, H, chunks * 64].
        inverse: T [B, H, chunks, 64, 64].
        written: r, of v's shape.
        states: S at the start of each chunk [B, H, chunks, K, V].
    """

    q: Tensor
    k: Tensor
    norms: Tensor
    gates: Tensor
    inverse: Tensor
    written: Tensor
    states: Tensor


def empty_saved(q: Tensor, v: Tensor) -> DeltaRuleSaved:
    """Uninitialized tensors of the shapes that `DeltaRuleSaved` describes."""
    batch, tokens, heads, width = v.shape
    chunks = -(-tokens // CHUNK)
    wide = wide_dtype(v.dtype)
    return DeltaRuleSaved(
        v.new_empty(q.shape),
        v.new_empty(q.shape),
        v.new_empty((2, *q.shape[:3]), dtype=wide),
        v.new_empty((4, batch, heads, chunks * CHUNK), dtype=wide),
        v.new_empty((batch, heads, chunks, CHUNK, CHUNK)),
        v.new_empty(v.shape),
        v.new_empty((batch, heads, chunks, q.shape[-1], width)),
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
