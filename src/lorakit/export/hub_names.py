"""Translate between tensor names in a base's files and in the class that loads them.

transformers renames some tensors while loading (Gemma 3's layers, Nemotron's backbone) and builds
others from several (experts). Merged models keep the names of the base's files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def loaded_names(model: Any, names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Find the place of each stored tensor in a model, as transformers' loader does.

    Returns:
        (name in the model of each tensor that is loaded unchanged, names of tensors that are
        combined or reshaped). Tensors in neither are not part of the model (Qwen3.5's MTP head).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    renamed: dict[str, str] = {}
    converted: set[str] = set()
    for name in names:
        place, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if place not in own and name in own:
            place, pattern = name, None
        if place not in own:
            continue
        if pattern is None:
            renamed[name] = place
        else:
            converted.add(name)
    return renamed, converted


def stored_names(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Rename and split tensors of a model as `save_pretrained` does, to the names in files."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Any] = revert_weight_conversion(model, tensors)
    return stored
