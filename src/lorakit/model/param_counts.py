"""Count a model's parameters by location from its config, without weights.

The model is built on the meta device, so every architecture that transformers knows is counted
exactly.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.model.base_class import (
    empty_base,
    is_inside,
    kept_in_16_bits,
    name_of,
    side_modules,
    text_decoder,
)
from lorakit.model.grouped_experts import can_group, expert_modules
from lorakit.model.layer_widths import LayerWidths, layer_widths
from lorakit.model.regex_limits import check_patterns
from lorakit.recipe.schema import Recipe

Shape = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """One raw tensor with a weight of all experts of a layer."""

    name: str
    number: int
    inputs: int
    outputs: int
    grouped: bool  # supported by `model/grouped_experts.py`: in 4 bits with QLoRA, and adaptable

    @property
    def elements(self) -> int:
        return self.number * self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class ParamCounts:
    """Parameter counts of a model, in elements.

    Experts in one raw tensor [E, D_out, D_in] are not linear layers: neither bitsandbytes nor
    peft's `target_modules` finds them.
    """

    # (name, D_in, D_out) of the decoder's linear layers that QLoRA quantizes: not the head, towers
    # or routers
    linear: tuple[Shape, ...]
    modules: tuple[str, ...]  # names of all modules
    adaptable: tuple[str, ...]  # names of modules that peft has LoRA layers for
    heads: tuple[str, ...]  # names of modules that map hidden states to logits
    total: int
    embedding: int
    head: int  # 0 if tied to the embedding
    expert_weights: tuple[ExpertWeight, ...]
    width: int  # of an embedding row
    layers: tuple[LayerWidths, ...]  # one per decoder layer
    decoder: str  # name of the module with the text model's layers
    sides: tuple[str, ...]  # names of other parts (towers, projectors), which stay frozen
    balances: bool  # transformers knows a loss that balances its experts

    @property
    def in_linear(self) -> int:
        """Elements of the linear layers."""
        return sum(i * o for _, i, o in self.linear)

    @property
    def experts(self) -> int:
        """Elements of raw expert tensors."""
        return sum(weight.elements for weight in self.expert_weights)

    @property
    def grouped_experts(self) -> int:
        """Elements of those that QLoRA quantizes."""
        return sum(weight.elements for weight in self.expert_weights if weight.grouped)


def lora_target_layers(recipe: Recipe, counted: ParamCounts) -> list[Shape]:
    """List the linear layers that get an adapter, by peft's rules: suffixes, or one pattern.

    Raises:
        RecipeError: the pattern is not valid, or takes too long to match.
    """
    check_patterns(recipe, counted.modules)
    return [shape for shape in counted.linear if is_target(recipe, shape[0])]


def adapted_weights(recipe: Recipe, counted: ParamCounts) -> list[ExpertWeight]:
    """List the raw expert tensors that get an adapter."""
    if recipe.expert_adapters != "all":
        return []
    return [weight for weight in counted.expert_weights if weight.grouped]


def is_target(recipe: Recipe, name: str) -> bool:
    """Return True if the recipe selects the layer of this name; its type is not checked."""
    wanted, layers = recipe.target_modules, recipe.layers_to_transform
    if ends(name, recipe.exclude_modules or []) or not is_named(wanted, name):
        return False
    return layers is None or layer_number(name) in layers


def is_named(wanted: str | Sequence[str], name: str) -> bool:
    """Return True if `target_modules` selects this name: a list by suffix, a pattern in full."""
    if wanted in ("all-linear", "auto"):
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return ends(name, wanted)


def ends(name: str, names: Sequence[str]) -> bool:
    """Return True if the name equals one of `names` or ends with it after a dot, as in peft."""
    return any(name == n or name.endswith(f".{n}") for n in names)


def layer_number(name: str) -> int | None:
    """Index of the decoder layer that contains this module, as in `layers_to_transform`."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def rank_of(recipe: Recipe, name: str) -> int:
    """Rank of the adapter of the layer of this name."""
    fits = (r for key, r in recipe.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(fits, recipe.lora_r)


def count_trainable(recipe: Recipe, counted: ParamCounts) -> int:
    """Count trainable elements: two matrices per target, and the modules in `modules_to_save`."""
    pairs = sum(rank_of(recipe, n) * (i + o) for n, i, o in lora_target_layers(recipe, counted))
    for weight in adapted_weights(recipe, counted):
        pairs += rank_of(recipe, weight.name) * weight.number * (weight.inputs + weight.outputs)
    full_modules = {"embed_tokens": counted.embedding, "lm_head": counted.head or counted.embedding}
    rows = len(set(recipe.trainable_tokens)) * (1 + (counted.head > 0)) * counted.width
    return pairs + rows + sum(full_modules.get(name, 0) for name in recipe.modules_to_save or [])


def count(config: Any) -> ParamCounts:
    """Count the parameters of this config's model; results are cached by the config's contents."""
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _count(_Keyed(key, config))


@dataclass(frozen=True)
class _Keyed:
    """A config that compares by its contents."""

    key: str
    config: Any = field(compare=False)


@functools.lru_cache(maxsize=8)
def _count(keyed: _Keyed) -> ParamCounts:
    import torch
    from transformers.pytorch_utils import Conv1D

    model = empty_base(keyed.config)
    kept = kept_in_16_bits(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    adaptable = (torch.nn.Linear, Conv1D, torch.nn.Embedding, *convolutions)
    linear: list[Shape] = []
    for name, module in model.named_modules():
        if is_inside(name, kept):
            continue
        if isinstance(module, Conv1D):  # GPT-2's, which bitsandbytes quantizes too
            linear.append((name, module.weight.shape[0], module.weight.shape[1]))
        elif isinstance(module, torch.nn.Linear):
            linear.append((name, module.in_features, module.out_features))
    tied = head is None or embedding is None or head.weight is embedding.weight
    return ParamCounts(
        tuple(linear),
        tuple(name for name, _ in model.named_modules() if name),
        tuple(name for name, module in model.named_modules() if isinstance(module, adaptable)),
        tuple(name for name, module in model.named_modules() if module is head),
        sum(p.numel() for p in model.parameters()),
        0 if embedding is None else embedding.weight.numel(),
        0 if tied else head.weight.numel(),
        tuple(_expert_weights(model, kept)),
        0 if embedding is None else int(embedding.weight.shape[-1]),
        layer_widths(model),
        name_of(model, text_decoder(model)),
        tuple(side_modules(model)),
        hasattr(model.config.get_text_config(), "router_aux_loss_coef"),
    )


def _expert_weights(model: Any, kept: set[str]) -> Iterator[ExpertWeight]:
    for path, module in expert_modules(model):
        if is_inside(path, kept):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.dim() == 3:
                number, first, second = tensor.shape
                sizes = (
                    (first, second) if getattr(module, "is_transposed", False) else (second, first)
                )
                yield ExpertWeight(f"{path}.{name}", number, *sizes, can_group(module))
