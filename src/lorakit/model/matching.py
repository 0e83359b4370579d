"""A recipe and a model's config enter; nothing leaves, or every name of it that fits no layer.

peft asks that one name of a list matches and passes over the rest, so a run with `[q_proj, vproj]`
trains half of what was asked for. Here every name has to match, before a weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from lorakit.errors import RecipeError, first_line
from lorakit.model.param_counts import ParamCounts, count, ends, is_named, is_target, layer_number
from lorakit.model.regex_limits import check_patterns
from lorakit.recipe.loader import suggest
from lorakit.recipe.schema import Recipe

SHOWN = 12  # names in a hint


def check_adapter_settings(recipe: Recipe, config: Any) -> None:
    """Refuse names and numbers that match nothing in this model, and what peft cannot attach.

    Args:
        recipe: with `target_modules` resolved.

    Raises:
        RecipeError: all of them, each with the nearest name that exists.
    """
    counted = count(config)
    check_patterns(recipe, counted.modules)
    faults = [*_targets(recipe, counted), *_others(recipe, counted)]
    if faults:
        found = "\n".join(faults)
        raise RecipeError(found, hint=f"layers of this model: {_listed(counted.adaptable)}")
    _try_on(recipe, config, counted)


def _targets(recipe: Recipe, counted: ParamCounts) -> Iterator[str]:
    """What is wrong with `target_modules` and `layers_to_transform`."""
    wanted = recipe.target_modules
    if isinstance(wanted, list):
        for name in wanted:
            yield from _unmatched("target_modules", name, counted)
    elif not any(is_named(wanted, name) for name in counted.adaptable):
        near = suggest(wanted, ["all-linear", *_last_parts(counted.adaptable)])
        yield (
            f"target_modules: the pattern {wanted!r} matches no layer's whole name{near}; "
            "names stand in a list: [q_proj, v_proj]"
        )
    head = [name for name in counted.heads if is_target(recipe, name)]
    if head and wanted not in ("all-linear", "auto"):
        yield (
            f"target_modules: {head[0]} is the head, which can get no adapter; "
            "train it in full: modules_to_save: [lm_head]"
        )
    if recipe.layers_to_transform is not None:
        named = (name for name in counted.adaptable if is_named(wanted, name))
        there = sorted({n for n in map(layer_number, named) if n is not None})
        for number in recipe.layers_to_transform:
            if there and number not in there:
                yield (
                    f"layers_to_transform: there is no target in layer {number}, expected some of "
                    f"{_ranges(there)}"
                )


def _others(recipe: Recipe, counted: ParamCounts) -> Iterator[str]:
    """What is wrong with the other keys that name modules."""
    for name in recipe.exclude_modules or []:
        yield from _unmatched("exclude_modules", name, counted)
    for name in recipe.modules_to_save or []:
        if not any(module.endswith(name) for module in counted.modules):
            near = suggest(name, _last_parts(counted.modules))
            yield f"modules_to_save: {name!r} matches no module of this model{near}"
    targets = [name for name in counted.adaptable if is_target(recipe, name)]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(recipe, key):
            if targets and not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                near = suggest(pattern, _last_parts(targets))
                yield f"{key}: {pattern!r} matches no layer that gets an adapter{near}"


def _unmatched(key: str, name: str, counted: ParamCounts) -> Iterator[str]:
    """A fault where no layer's name ends with `name`."""
    if any(ends(layer, [name]) for layer in counted.adaptable):
        return
    inside = [module for module in counted.modules if ends(module, [name])]
    if inside:
        within = [layer for layer in counted.adaptable if layer.startswith(f"{inside[0]}.")]
        names = f"; name them: {_listed(within)}" if within else ""
        yield f"{key}: {name!r} is no layer but a module around layers{names}"
        return
    known = counted.adaptable if "." in name else _last_parts(counted.adaptable)
    yield f"{key}: {name!r} matches no layer of this model{suggest(name, known)}"


def _try_on(recipe: Recipe, config: Any, counted: ParamCounts) -> None:
    """Let peft attach the adapter to the model without weights: what it refuses, it refuses now."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from lorakit.model.lora_config import lora_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        # Schemes that start from the weights need them.
        settings = replace(lora_config(recipe), init_lora_weights=True)
        get_peft_model(model, settings, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise RecipeError(
            f"the adapter cannot be attached: {first_line(error)}",
            hint=f"layers of this model: {_listed(counted.adaptable)}",
        ) from error


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names} - {""})


def _listed(names: Iterable[str]) -> str:
    parts = [part for part in _last_parts(names) if not part.isdigit()]
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1 to 3, 7"."""
    said: list[str] = []
    for number in numbers:
        if number - 1 not in numbers:
            said.append(f"{number}")
        elif number + 1 not in numbers:
            said[-1] += f" to {number}"
    return ", ".join(said)
