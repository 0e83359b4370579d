"""Widths of each decoder layer, from a model on the meta device.

They come from the modules, not the config: a config may hold one number per layer (Gemma 3n's
`intermediate_size`), raise for an attribute (Gemma 4's `head_dim`), or use its own names for its
mixers (Qwen3.5, LFM2, Falcon-H1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.model.base_class import text_decoder

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "top_k_experts", "experts_per_token", "moe_topk", "moe_k")
# Names of attention's output projection.
_OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# An expert that is a separate module in a list.
_ONE_OF_MANY = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True, slots=True)
class LayerWidths:
    """Elements that one token uses in one decoder layer; of the experts, only the routed ones."""

    products: float  # weights of all matrix products
    moved: float  # their inputs and outputs
    queries: int  # heads x head size of softmax attention; 0 where the layer has none
    keys_values: int  # KV cache elements per token of such a layer
    inner: float  # widest input of a product whose output has the model's width
    plain: bool  # without experts and without convolutions (state space layers)


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product of a module: its name in the layer, and its sizes."""

    name: str
    inputs: int
    outputs: int


def expert_elements(name: str, module: Any) -> int:
    """Count elements of raw expert tensors [E, ., .] directly in `module`.

    The name is checked too, since a convolution's weight [C, 1, K] also has three dimensions.
    """
    if "expert" not in f"{name} {type(module).__name__}".lower():
        return 0
    return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)


def setting(config: Any, names: Iterable[str]) -> int | None:
    """First of these settings that the config has; the largest value of a per-layer list."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers: "is a per-layer attribute"
            continue
        if isinstance(value, list | tuple):
            value = max(value, default=None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def decoder_layers(model: Any) -> Any:
    """The ModuleList of the text model's layers; None if the model has none of that length."""
    import torch

    layer_count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in text_decoder(model).modules() if isinstance(m, torch.nn.ModuleList))
    return next((m for m in lists if len(m) == layer_count), None)


def layer_widths(model: Any) -> tuple[LayerWidths, ...]:
    """Widths of each decoder layer in order; one entry for all if the model has no layer list."""
    config, layers = model.config.get_text_config(), decoder_layers(model)
    head = model.get_output_embeddings()
    blocks = [text_decoder(model)] if layers is None else list(layers)
    return tuple(_widths(block, config, head) for block in blocks)


def _widths(layer: Any, config: Any, head: Any) -> LayerWidths:
    model = int(config.hidden_size)
    experts_per_token, experts = setting(config, CHOSEN), setting(config, EXPERTS)
    products = moved = inner = 0.0
    queries = keys_values = 0
    attention_products: set[str] = set()  # names of attention's own products
    for name, module in layer.named_modules():
        attention = _attention(module)
        if attention is not None:
            queries += attention[0]
            keys_values += attention[1]
            attention_products |= {f"{name}.{child}" for child, _ in module.named_children()}
    for linear in _linears(layer, head):
        share = 1.0
        if _ONE_OF_MANY.search(f"{linear.name}."):
            share = (experts_per_token or experts or 1) / (experts or 1)
        products += share * linear.inputs * linear.outputs
        moved += share * (linear.inputs + linear.outputs)
        if linear.outputs == model and linear.name not in attention_products:
            inner = max(inner, linear.inputs)
    for name, module in layer.named_modules():
        if not expert_elements(name, module):
            continue
        tensors = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        routed = experts_per_token or tensors[0].shape[0]
        sides = [side for tensor in tensors for side in tensor.shape[1:]]
        products += routed * sum(tensor.shape[1] * tensor.shape[2] for tensor in tensors)
        # The model's width counts once: a token's row is summed over its experts.
        moved += sum(side if side == model else routed * side for side in sides)
        # Gate and up may be one tensor of twice the width.
        inner = max(inner, routed * min((side for side in sides if side != model), default=model))
    plain = all(p.dim() < 3 for p in layer.parameters())
    return LayerWidths(products, moved, queries, keys_values, inner, plain)


def _linears(layer: Any, head: Any) -> Iterator[Linear]:
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in layer.named_modules():
        if isinstance(module, Conv1D):
            yield Linear(name, module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, torch.nn.Linear) and module is not head:
            yield Linear(name, module.in_features, module.out_features)


def _attention(module: Any) -> tuple[int, int] | None:
    """Return (queries, keys and values) of a softmax attention module, else None."""
    if not type(module).__name__.endswith("Attention"):
        return None
    children = dict(module.named_children())
    out = next((children[name] for name in _OUT if name in children), None)
    queries = getattr(out, "in_features", None)
    if queries is None:
        weight = getattr(out, "weight", None)  # GPT-2's Conv1D
        if weight is None:
            return None
        queries = weight.shape[0]
    return int(queries), 2 * int(queries) // (getattr(module, "num_key_value_groups", None) or 1)
