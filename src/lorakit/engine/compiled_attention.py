"""Attention of compiled layers, under transformers' interface for attention functions.

Full causal rows use torch's scaled_dot_product_attention. Windows and packed documents use torch's
variable-length FlashAttention-2, whose work shrinks with the window: with sdpa a window of 1,024 in
2,048 tokens is a mask, which rules out the fast kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.engine.attention import HAS_WINDOWS, varlen
from lorakit.engine.lora_linear import Unsupported
from lorakit.ops.backend import has_matrix_kernels

# Names under which transformers finds the two implementations.
KERNELS, DEFINITION = "lorakit", "lorakit_definition"
# FlashAttention-2's widest head.
WIDEST_HEAD = 256
# Arguments of attention functions that change the result and that these kernels do not have.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def _attention(
    kernels: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a training pass: no cache, rows padded on the right or packed.

    Args:
        kernels: use the kernel for windows and documents, else masks.
        query: [B, H, T, d]; key and value: [B, Hk, T, d].
        attention_mask: not used; a token never attends to padding on its right.
        sliding_window: tokens that each token attends to, itself included; None for all.
        cu_seq_lens_q: borders [n + 1] int32 of the documents in the one packed row.
        max_length_q: the longest document's length.

    Returns:
        (output [B, T, H, d], None).

    Raises:
        Unsupported: the layer asks for something that these kernels do not compute.
    """
    given = [name for name in _UNSUPPORTED if more.get(name) is not None]
    if given or not getattr(module, "is_causal", True) or more.get("is_causal") is False:
        raise Unsupported(f"attention with {', '.join(given) or 'both directions'}")
    window = sliding_window
    if cu_seq_lens_q is None:
        if window is not None and window >= query.shape[2]:
            window = None
        if window is None:
            return _dense(query, key, value, scaling), None
    if not kernels or query.dtype == torch.float32:
        return _masked(query, key, value, scaling, window, cu_seq_lens_q), None
    if query.shape[-1] > WIDEST_HEAD or (window is not None and not HAS_WINDOWS):
        raise Unsupported(f"windows or packed documents with heads {query.shape[-1]} wide")
    return _varlen(query, key, value, scaling, window, cu_seq_lens_q, max_length_q), None


def _dense(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    borders: Tensor | None,
) -> Tensor:
    """The definition, with all pairs of tokens in a mask."""
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    if borders is not None:
        document = torch.searchsorted(borders[1:].contiguous(), place, right=True)
        allowed = allowed & (document[:, None] == document[None, :])
    out = functional.scaled_dot_product_attention(
        query, key, value, allowed, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    borders: Tensor | None,
    longest: int | None,
) -> Tensor:
    rows, heads, length, width = query.shape
    if borders is None:
        borders = torch.arange(
            0, (rows + 1) * length, length, dtype=torch.int32, device=query.device
        )
        longest = length
    elif longest is None:
        longest = length
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return varlen(q, k, v, scaling, borders, longest, window).view(rows, length, heads, width)


def register(device: torch.device) -> str:
    """Make attention for this device known to transformers, and return its name.

    transformers builds no masks for a name without a mask function.
    """
    from transformers import AttentionInterface

    kernels = has_matrix_kernels(torch.empty(0, device=device))
    name = KERNELS if kernels else DEFINITION
    AttentionInterface.register(name, functools.partial(_attention, kernels))
    return name


@contextlib.contextmanager
def attention_of(config: Any, name: str) -> Iterator[None]:
    """Select an attention function for the layers that read this config, and restore it."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
