"""Choose the linear layers that get adapters: those of the text decoder, by family.

Vision and audio towers stay frozen: no token of a text-only run passes through them, so their
adapters would get no gradient.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorakit.model.architectures import FAMILIES, MLPS, Family
from lorakit.model.base_class import STATE_SPACE, empty_base
from lorakit.model.param_counts import ParamCounts, count, ends

_GATES = {"gate", "shared_expert_gate"}


def lora_targets(config: Any, expert_adapters: str = "shared") -> tuple[str | list[str], str]:
    """Target modules for `target_modules: auto`, and a short reason.

    Args:
        expert_adapters: as in the recipe; "none" leaves MLPs out.
    """
    text_type = getattr(config.get_text_config(), "model_type", "")
    counted = count(config)
    row = FAMILIES.get(text_type)
    if row is None:
        targets, reason = all_linear(config)
        unknown = f"model family {text_type or 'unknown'} is not in the table"
        return targets, f"{unknown}: {reason}"
    inside = [name for name, _, _ in counted.linear]
    leaves = [leaf for leaf in row.targets if any(ends(name, [leaf]) for name in inside)]
    if expert_adapters == "none":
        leaves = [leaf for leaf in leaves if leaf not in MLPS]
    notes = [f"model family {text_type}", *_notes(row, counted, expert_adapters)]
    return in_decoder(leaves, counted), "; ".join(notes)


def all_linear(config: Any) -> tuple[str | list[str], str]:
    """Target modules for `all-linear`: linear layers of the text decoder, and the omitted ones.

    Routers, experts, and layers that peft refuses or exchanges for experts get no adapter.
    """
    counted = count(config)
    chosen = sorted({_leaf(name) for name, _, _ in counted.linear if not _is_router(name)})
    kept = _accepted_by_peft(config, counted, chosen)
    reason = "all linear layers" + (" of its text decoder" if counted.sides else "")
    refused = sorted(set(chosen) - set(kept))
    if refused:
        reason += f" except {', '.join(refused)}, which cannot get an adapter of their own"
    elif counted.experts:
        reason += " except experts and router"
    every = {_leaf(name) for name, _, _ in counted.linear}
    if set(kept) == every and not counted.sides and not counted.experts:
        return "all-linear", reason
    return in_decoder(kept, counted), reason


def in_decoder(leaves: Sequence[str], counted: ParamCounts) -> str | list[str]:
    """Names as `target_modules`: a list, or a pattern where layers of towers have these names too.

    Args:
        leaves: names or last components of names.
    """
    # Of all modules, since peft refuses any other kind that has the name (Gemma 4's vision tower).
    outside = [name for name in counted.modules if not name.startswith(f"{counted.decoder}.")]
    if not counted.decoder or not any(ends(name, leaves) for name in outside):
        return list(leaves)
    names = "|".join(re.escape(leaf) for leaf in leaves)
    return rf"{re.escape(counted.decoder)}\.(?:.*\.)?(?:{names})"


def _notes(row: Family, counted: ParamCounts, expert_adapters: str) -> Iterator[str]:
    """Say what gets no adapter, and why; Gemma 4 E2B has no experts."""
    if counted.experts:
        every = expert_adapters == "all"
        yield "every expert gets one, the router none" if every else "experts and router get none"
        if row.names_experts:
            yield "nor do dense and shared MLPs, by whose names PEFT adapts the experts"
        elif expert_adapters == "none":
            yield "nor do MLPs (expert_adapters: none)"
    if row.without:
        yield row.without


def _leaf(name: str) -> str:
    """Last component of a name, with the one before it for a number in a list."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent.rpartition('.')[2]}.{leaf}" if leaf.isdigit() else leaf


def _is_router(name: str) -> bool:
    return any(part in _GATES or "router" in part for part in name.split("."))


def _accepted_by_peft(config: Any, counted: ParamCounts, leaves: Iterable[str]) -> list[str]:
    """Names among `leaves` that peft adapts as linear layers of this model.

    peft refuses `out_proj` of some state space models, and turns names of MLPs into fused experts.
    """
    from peft import LoraConfig, get_peft_model

    model = empty_base(config)
    names = [leaf for leaf in leaves if not _in_state_space(model, leaf)]
    settings = LoraConfig(r=1, target_modules=in_decoder(names, counted))
    with warnings.catch_warnings(action="ignore"):  # on names that become experts
        tried = get_peft_model(model, settings, low_cpu_mem_usage=True)
    accepted = tried.peft_config["default"].target_modules
    return names if isinstance(accepted, str) else [leaf for leaf in names if leaf in accepted]


def _in_state_space(model: Any, leaf: str) -> bool:
    """True for `out_proj` of a module whose class or name contains Mamba."""
    if leaf != "out_proj":
        return False
    modules = dict(model.named_modules())
    parents = (name.rpartition(".")[0] for name in modules if ends(name, [leaf]))
    return any(
        STATE_SPACE.search(f"{parent} {type(modules[parent]).__name__}") for parent in parents
    )
