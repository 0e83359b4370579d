"""Attach a recipe's LoRA adapter to a frozen base with PEFT.

LoRA (arXiv 2106.09685, eq. 3): h = W x + (alpha / r) B A x, with A [R, D_in], B [D_out, R], B = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from lorakit.errors import RecipeError, first_line
from lorakit.model.load import copy_biases, public_name, remember_biases
from lorakit.model.lora_targets import all_linear, in_decoder, lora_targets
from lorakit.model.param_counts import count, ends
from lorakit.model.regex_limits import check_patterns
from lorakit.model.trainable_tokens import token_indices
from lorakit.recipe.aliases import LORA_KEYS
from lorakit.recipe.loader import ResolvedRecipe, suggest
from lorakit.recipe.schema import Recipe

# Fields of LoraConfig without a key of the recipe that training, export and its check support.
SUPPORTED_FIELDS = ("lora_bias",)
_REASONS = {
    "base_model_name_or_path": "model names the base",
    "revision": "it is a key of the recipe",
    "trainable_token_indices": "trainable_tokens names the tokens",
    "target_parameters": "expert_adapters: all adapts the experts",
    "layer_replication": "the trained model would have other layers than its base",
}


def resolve_targets(resolved: ResolvedRecipe, config: Any) -> ResolvedRecipe:
    """Replace `target_modules` by layers of the text decoder; the reason becomes its origin.

    `auto` gives the family's list, `all-linear` all linear layers. A list stays as it is unless
    towers have layers of these names too.
    """
    wanted = resolved.recipe.target_modules
    targets: str | list[str]
    if isinstance(wanted, list):
        counted = count(config)
        inside = [name for name, _, _ in counted.linear]
        # A name that matches nothing stays, so that `check_adapter_settings` reports it.
        matched = all(any(ends(layer, [name]) for layer in inside) for name in wanted)
        targets = in_decoder(wanted, counted) if matched else wanted
        reason = f"{', '.join(wanted)} of the text decoder"
    elif wanted == "auto":
        targets, reason = lora_targets(config, resolved.recipe.expert_adapters)
    elif wanted == "all-linear":
        targets, reason = all_linear(config)
    else:
        return resolved
    return resolved if targets == wanted else resolved.derive(reason, target_modules=targets)


def add_adapter(base: Any, recipe: Recipe, rows: Sequence[int] = ()) -> Any:
    """Wrap `base` with the recipe's LoRA; only the adapter and parts that the recipe names train.

    Args:
        rows: token ids whose embedding rows train, see `model/trainable_tokens.py`.

    Adapters are float32 for every base dtype: in bf16 at a learning rate of 2e-5 only 22% of
    lora_A's elements changed in 12 AdamW steps, in float32 all of them did.

    Raises:
        RecipeError: a target matches no layer, or peft refuses an option for this base.
    """
    from peft import get_peft_model

    check_patterns(recipe, (name for name, _ in base.named_modules() if name))
    biases = copy_biases(base) if recipe.bias != "none" else {}
    try:
        config = lora_config(recipe, base)
        config.trainable_token_indices = token_indices(base, rows)
        model = get_peft_model(base, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(f"the adapter cannot be attached: {first_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    remember_biases(model, biases)
    if recipe.expert_adapters == "all":
        # PEFT refuses to load an adapter of raw tensors with dropout, which only training uses.
        model.peft_config["default"].lora_dropout = 0.0
    # peft would save the local path that the base was loaded from.
    model.peft_config["default"].base_model_name_or_path = public_name(recipe.model)
    return model


def lora_config(recipe: Recipe, base: Any = None) -> Any:
    """Build peft's LoraConfig from the recipe's adapter settings.

    Args:
        base: model whose experts get adapters if the recipe says so; its experts are grouped.
    """
    from peft import LoraConfig

    values = recipe.model_dump()
    if recipe.init_lora_weights == "eva":
        values["init_lora_weights"] = True  # until `eva_weights` has seen the data
    named = {field: values[key] for field, key in LORA_KEYS.items()}
    config = LoraConfig(task_type="CAUSAL_LM", **named, **values["lora"])
    if base is not None and recipe.expert_adapters == "all":
        from lorakit.model.expert_lora import adapt_experts

        adapt_experts(config, base)
    return config


def field_faults(recipe: Recipe) -> Iterator[str]:
    """Yield the fields in `lora` that LoraConfig does not have, or that are not supported."""
    from peft import LoraConfig

    known = [*LORA_KEYS, *(field.name for field in fields(LoraConfig))]
    for name in recipe.lora:
        if name not in known:
            yield f"lora: {name}: peft's LoraConfig has no such field{suggest(name, known)}"
        elif name not in SUPPORTED_FIELDS:
            reason = _REASONS.get(name, "training with it is not verified by an export")
            yield f"lora: {name} is not supported: {reason}"


def count_parameters(model: Any) -> tuple[int, int]:
    """Count (trainable, all) parameters; a packed 4-bit weight counts its elements."""
    trainable = total = 0
    for parameter in model.parameters():
        size = parameter.numel()
        if getattr(parameter, "quant_state", None) is not None:
            size *= 2
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total
