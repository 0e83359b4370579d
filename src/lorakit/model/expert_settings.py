"""Check the settings of adapters on experts before weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lorakit.model.adapter_init import SUPPORTED
from lorakit.model.param_counts import ParamCounts, adapted_weights
from lorakit.model.stored_quantization import read_once
from lorakit.recipe.schema import Recipe


def expert_faults(recipe: Recipe, counted: ParamCounts) -> Iterator[str]:
    """Yield what is wrong with `expert_adapters` for this recipe and model."""
    chosen = recipe.expert_adapters
    if chosen != "shared" and not counted.experts:
        yield f"expert_adapters: {chosen}, but this model has no experts; leave it out"
        return
    if recipe.router_aux_loss_coef and not counted.balances:
        yield (
            "router_aux_loss_coef: this model's routers have no such loss in transformers; leave "
            "it out"
        )
    if chosen != "all":
        return
    if not any(weight.grouped for weight in counted.expert_weights):
        first = counted.expert_weights[0].name
        yield f"expert_adapters: all: no product by expert is known for {first}; set shared"
        return
    reasons = {
        "use_dora": recipe.use_dora and "DoRA scales complete weights",
        "bias": recipe.bias != "none" and "PEFT trains no biases of raw tensors",
        "lora": recipe.lora.get("lora_bias") and "PEFT gives raw tensors no lora_bias",
        "layers_to_transform": recipe.layers_to_transform is not None
        and "PEFT adapts raw tensors of all layers",
        "init_lora_weights": recipe.init_lora_weights in SUPPORTED[1:]
        and f"{recipe.init_lora_weights} needs the weight of a linear layer",
        "fsdp": recipe.fsdp is not None and "FSDP shards no experts with adapters",
    }
    for key, reason in reasons.items():
        if reason:
            yield f"{key}: not supported with expert_adapters: all: {reason}"


def expert_notes(recipe: Recipe, config: Any) -> Iterator[str]:
    """Yield what a run says of its experts before it starts."""
    if stored := read_once(recipe, config):
        yield stored
    if recipe.expert_adapters == "all":
        yield (
            "adapters are saved in PEFT's target_parameters, which only PEFT reads: vLLM, "
            "SGLang, llama.cpp and Ollama get the merged model (lorakit export); set "
            "expert_adapters: shared to serve an adapter"
        )


def pattern_of_experts(pattern: str, recipe: Recipe, counted: ParamCounts) -> str:
    """End of a message about a pattern that names experts; "" if it names none."""
    if "expert" not in pattern or not counted.experts:
        return ""
    adapted = adapted_weights(recipe, counted)
    if not adapted:
        return "; experts get adapters with expert_adapters: all"
    number = re.search(r"experts\\?\.(\d+)", pattern)
    names = " or ".join(sorted({".".join(w.name.split(".")[-2:]) for w in adapted}))
    if number and int(number[1]) >= adapted[0].number:
        return f"; there are {adapted[0].number} experts, and one rank for all: name {names}"
    return f"; all experts of a tensor have one rank: name {names}"
