"""Check that every module name in a recipe matches a layer of the model.

peft requires only one name of a list to match and ignores the rest, so a run with `[q_proj, vproj]`
trains half of the intended layers. Here every name has to match, before weights are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from lorakit.errors import RecipeError, first_line
from lorakit.model.adapter_init import init_faults
from lorakit.model.base_class import empty_base, is_inside
from lorakit.model.expert_settings import expert_faults, pattern_of_experts
from lorakit.model.lora_config import field_faults, lora_config
from lorakit.model.param_counts import (
    ParamCounts,
    adapted_weights,
    count,
    ends,
    is_named,
    is_target,
    layer_number,
)
from lorakit.model.regex_limits import check_patterns
from lorakit.recipe.loader import suggest
from lorakit.recipe.schema import Recipe

SHOWN = 12  # names in a hint


def check_adapter_settings(recipe: Recipe, config: Any) -> None:
    """Refuse names and layer indices that match nothing, and settings that peft refuses.

    Args:
        recipe: with `target_modules` resolved.

    Raises:
        RecipeError: lists all of them, each with the nearest existing name.
    """
    counted = count(config)
    check_patterns(recipe, counted.modules)
    faults = [*_targets(recipe, counted), *_others(recipe, counted)]
    faults += expert_faults(recipe, counted)
    if faults:
        message = "\n".join([*faults, *init_faults(recipe, counted)])
        raise RecipeError(
            message,
            hint=f"layers of this model: {_listed(set(counted.adaptable) - set(counted.heads))}",
        )
    if faults := [*field_faults(recipe), *init_faults(recipe, counted)]:
        raise RecipeError("\n".join(faults))
    _try_on(recipe, config, counted)


def _targets(recipe: Recipe, counted: ParamCounts) -> Iterator[str]:
    """Yield faults of `target_modules` and `layers_to_transform`."""
    wanted = recipe.target_modules
    if isinstance(wanted, list):
        for name in wanted:
            yield from _unmatched("target_modules", name, counted)
    elif not any(is_named(wanted, name) for name in counted.adaptable):
        near = suggest(wanted, ["all-linear", *_last_parts(counted.adaptable)])
        yield (
            f"target_modules: the pattern {wanted!r} matches no complete layer name{near}; "
            "write names as a list: [q_proj, v_proj]"
        )
    head = [name for name in counted.heads if is_target(recipe, name)]
    if head and wanted not in ("all-linear", "auto"):
        yield (
            f"target_modules: {head[0]} is the head, which cannot get an adapter; "
            "train it in full with modules_to_save: [lm_head]"
        )
    frozen = [
        n for n in counted.adaptable if is_inside(n, set(counted.sides)) and is_target(recipe, n)
    ]
    if frozen:
        yield (
            f"target_modules: {frozen[0]} is outside the text decoder ({counted.decoder}); no text "
            "passes through it, so its adapter would never train"
        )
    if recipe.layers_to_transform is not None:
        named = (name for name in counted.adaptable if is_named(wanted, name))
        layers = sorted({n for n in map(layer_number, named) if n is not None})
        for layer in recipe.layers_to_transform:
            if layers and layer not in layers:
                yield (
                    f"layers_to_transform: layer {layer} has no target, expected some of "
                    f"{_ranges(layers)}"
                )


def _others(recipe: Recipe, counted: ParamCounts) -> Iterator[str]:
    """Yield faults of the other keys that name modules."""
    for name in recipe.exclude_modules or []:
        yield from _unmatched("exclude_modules", name, counted)
    for name in recipe.modules_to_save or []:
        if not any(module.endswith(name) for module in counted.modules):
            near = suggest(name, _last_parts(counted.modules))
            yield f"modules_to_save: {name!r} matches no module of this model{near}"
    targets = [name for name in counted.adaptable if is_target(recipe, name)]
    targets += [weight.name for weight in adapted_weights(recipe, counted)]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(recipe, key):
            if targets and not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                near = suggest(pattern, _last_parts(targets))
                near = pattern_of_experts(pattern, recipe, counted) or near
                yield f"{key}: {pattern!r} matches no layer that gets an adapter{near}"


def _unmatched(key: str, name: str, counted: ParamCounts) -> Iterator[str]:
    """Yield a fault if no layer's name ends with `name`."""
    if any(ends(layer, [name]) for layer in counted.adaptable):
        return
    inside = [module for module in counted.modules if ends(module, [name])]
    if inside:
        within = [layer for layer in counted.adaptable if layer.startswith(f"{inside[0]}.")]
        names = f"; name them: {_listed(within)}" if within else ""
        yield f"{key}: {name!r} is a module that contains layers, not a layer{names}"
        return
    known = counted.adaptable if "." in name else _last_parts(counted.adaptable)
    yield f"{key}: {name!r} matches no layer of this model{suggest(name, known)}"


def _try_on(recipe: Recipe, config: Any, counted: ParamCounts) -> None:
    """Attach the adapter to a model without weights, so that peft refuses before loading."""
    from peft import get_peft_model

    model = empty_base(config)
    try:
        # Initialization from the weights (PiSSA) would need them.
        plain = recipe.model_copy(update={"init_lora_weights": True})
        settings = lora_config(plain, model)
        wanted = set(settings.target_parameters or ())
        with warnings.catch_warnings(action="ignore"):  # on patterns that match no expert
            tried = get_peft_model(model, settings, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        hint = None
        if "ParamWrapper" in str(error):  # peft's adapter of raw tensors
            hint = (
                "target_modules names experts, which PEFT adapts only with lora_dropout: 0; "
                "target_modules: auto leaves them out, and expert_adapters: all adapts them"
            )
        elif "Mamba" in str(error):
            hint = "target_modules: auto leaves this layer out"
        raise RecipeError(
            f"the adapter cannot be attached: {first_line(error)}", hint=hint
        ) from error
    # peft 0.21 maps the names of an MLP to raw tensors of the experts in some families, whatever
    # module they are part of, and in a list of complete names or a regex as well.
    experts = set(tried.peft_config["default"].target_parameters or ()) - wanted
    if experts:
        raise RecipeError(
            f"target_modules: PEFT adapts the routed experts ({', '.join(sorted(experts))}) of "
            f"{config.get_text_config().model_type} in place of dense and shared MLPs",
            hint="leave gate_proj, up_proj and down_proj out, as target_modules: auto does",
        )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names} - {""})


def _listed(names: Iterable[str]) -> str:
    labels = [label for label in _last_parts(names) if not label.isdigit()]
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more


def _ranges(numbers: list[int]) -> str:
    """Format 1, 2, 3, 7 as "1 to 3, 7"."""
    ranges: list[str] = []
    for number in numbers:
        if number - 1 not in numbers:
            ranges.append(f"{number}")
        elif number + 1 not in numbers:
            ranges[-1] += f" to {number}"
    return ", ".join(ranges)
