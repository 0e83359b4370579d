"""Check `init_lora_weights` before weights are loaded.

peft accepts some schemes by name and then starts at random, because they are initialized by a
second call with data (EVA, LoRA-GA, CorDA), and it reports others only after the base was loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lorakit.model.param_counts import ParamCounts, is_target, lora_target_layers, rank_of
from lorakit.recipe.loader import suggest
from lorakit.recipe.schema import Recipe

SUPPORTED = ("gaussian", "orthogonal", "eva", "olora", "pissa", "pissa_niter_16")
UNSUPPORTED = {
    "corda": "changes the base by its data, which an export could not repeat",
    "lora_ga": "changes the base by gradients of its data, which an export could not repeat",
    "loftq": "needs a base that is quantized together with the adapter; method: qlora quantizes "
    "the base to NF4 without it",
    "mica": "trains only lora_A, which lorakit does not support",
}
_NITER = re.compile(r"pissa_niter_[1-9]\d{0,3}")


def init_faults(recipe: Recipe, counted: ParamCounts) -> Iterator[str]:
    """Yield what is wrong with `init_lora_weights` for this recipe and model."""
    scheme = recipe.init_lora_weights
    if isinstance(scheme, bool):
        return
    key = f"init_lora_weights: {scheme}"
    if scheme in UNSUPPORTED:
        yield f"{key} {UNSUPPORTED[scheme]}; use true, {', '.join(SUPPORTED)}"
        return
    if scheme not in SUPPORTED and not _NITER.fullmatch(scheme):
        known = [*SUPPORTED, *UNSUPPORTED]
        near = suggest(scheme, known)
        yield f"{key}: unknown, expected true, false, {', '.join(SUPPORTED)}{near}"
        return
    others = {shape[0] for shape in counted.linear} | set(counted.heads)
    for name in counted.adaptable:
        chosen = recipe.target_modules != "all-linear" and is_target(recipe, name)
        if chosen and name not in others:
            yield f"{key} has no effect on {name}, which is not a linear layer"
            break
    from_weights = scheme.startswith(("pissa", "olora", "eva"))
    if scheme == "eva" and recipe.fsdp is not None:
        yield f"{key} needs the complete base on each GPU; remove fsdp, or use true"
    if scheme.startswith("pissa") and recipe.method == "qlora":
        yield (
            f"{key} splits the 16-bit weights, which method: qlora does not keep; set "
            "method: lora, or init_lora_weights: olora"
        )
    for name, narrow, wide in lora_target_layers(recipe, counted):
        rank = rank_of(recipe, name)
        if scheme == "orthogonal" and rank % 2:
            yield f"{key} needs an even rank, but lora_r of {name} is {rank}"
            return
        if from_weights and rank > min(narrow, wide):
            yield (
                f"{key} needs a rank up to the smaller side of a layer, but lora_r of {name} "
                f"[{wide}, {narrow}] is {rank}"
            )
            return
