"""Compare what config.json says of a tied output embedding with the stored weights.

transformers loads two tensors where config.json says tied, but both are stored and differ. Counts,
merged files and their config then have to have two as well: an engine that believes the config
would compute logits with the wrong one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.model.safetensors_io import Stored, stored_tensors

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")


def untie_if_stored_apart(config: Any, folder: Path) -> None:
    """Set `tie_word_embeddings` to False if the folder has two different embeddings."""
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    if not any(getattr(part, "tie_word_embeddings", False) for part in parts):
        return
    try:
        stored = list(stored_tensors(folder).values())
    except (LorakitError, OSError):
        return  # no weights here, or damaged ones, which loading reports
    heads = [tensor for tensor in stored if tensor.name.endswith(_HEADS)]
    embeddings = [tensor for tensor in stored if tensor.name.endswith(_EMBEDDINGS)]
    if len(heads) == len(embeddings) == 1 and not _equal(heads[0], embeddings[0]):
        for part in parts:
            part.tie_word_embeddings = False


def _equal(one: Stored, other: Stored) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(one.path, "pt") as first, safe_open(other.path, "pt") as second:
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        if a.get_shape() != b.get_shape():
            return False
        starts = range(0, a.get_shape()[0], 4096)
        return all(torch.equal(a[s : s + 4096], b[s : s + 4096]) for s in starts)
