"""Our operations in place of functions of a model's layers.

Each takes the arguments that a layer gives to transformers' torch implementation, and returns None
for a call that it does not compute: with a cache, of another signature, or (`only_kernels`) one for
which it has no Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels
from lorakit.ops.causal_conv import causal_conv
from lorakit.ops.gated_delta_rule import gated_delta_rule, uses_delta_kernels

_SILU = {"silu": True, "swish": True, None: False}


def documents_of(arguments: Mapping[str, Any], tokens: int, device: torch.device) -> Tensor | None:
    """Document numbers int32 [1, T] of a packed row, without waiting for the GPU."""
    if arguments.get("seq_idx") is not None:
        return arguments["seq_idx"].reshape(1, -1)
    borders: Tensor | None = arguments.get("cu_seqlens")
    if borders is None:
        return None
    positions = torch.arange(tokens, device=device, dtype=borders.dtype)
    return torch.searchsorted(borders[1:], positions, right=True, out_int32=True).unsqueeze(0)


def _wanted(faster: Callable[..., bool], *tensors: Tensor) -> bool:
    """True if ours is faster here, or torch.compile traces: ours is one operator to it."""
    return torch.compiler.is_compiling() or faster(*tensors)


def delta_rule(arguments: Mapping[str, Any], only_kernels: bool) -> Any:
    """`torch_chunk_gated_delta_rule` by ours."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    documents = documents_of(arguments, value.shape[1], value.device)
    cached = arguments.get("initial_state") is not None or arguments.get("output_final_state")
    plain = only_kernels or documents is None
    if cached or (plain and not _wanted(uses_delta_kernels, key, value)):
        return None
    out = gated_delta_rule(
        query, key, value, arguments["g"], arguments["beta"], documents,
        bool(arguments.get("use_qk_l2norm_in_kernel")),
    )  # fmt: skip
    return out, None


def convolution(arguments: Mapping[str, Any], only_kernels: bool) -> Any:
    """`causal_conv1d_fn` by ours."""
    x, weight = arguments["hidden_states"], arguments["weight"]
    documents = documents_of(arguments, x.shape[-1], x.device)
    activation = arguments.get("activation")
    known = activation in _SILU and x.dim() == 3 and weight.dim() == 2
    plain = only_kernels or documents is None
    if not known or (plain and not _wanted(has_kernels, x)):
        return None
    return causal_conv(x, weight, arguments.get("bias"), _SILU[activation], documents)


# By the name of the torch implementation.
OWN: dict[str, Callable[[Mapping[str, Any], bool], Any]] = {
    "torch_chunk_gated_delta_rule": delta_rule,
    "causal_conv1d_fn": convolution,
}
