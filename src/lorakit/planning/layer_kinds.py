"""A model's config enters; the kind of each decoder layer, and the few to run of them, leave."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from lorakit.model.layer_widths import decoder_layers


def layer_kinds(config: Any) -> list[Hashable]:
    """Of each decoder layer what tells its kind: its modules and the shapes of its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model) or ()
    return [
        (
            tuple(type(module).__name__ for module in layer.modules()),
            tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()),
        )
        for layer in layers
    ]


def depths_to_run(kinds: Sequence[Hashable]) -> tuple[list[int], list[float]]:
    """(how many of the first layers to run, in several runs, and what each run counts in the sum).

    The bytes of the first n layers are `fixed + sum over kinds of count x bytes`, so the whole is a
    sum of runs as soon as its counts are one of theirs: of 32 layers alike, 31 x (2) - 30 x (1).
    """
    import numpy

    names = list(dict.fromkeys(kinds))
    whole = [1, *(kinds.count(name) for name in names)]
    rows: list[list[int]] = []
    depths: list[int] = []
    for depth in range(1, len(kinds)):
        row = [1, *(kinds[:depth].count(name) for name in names)]
        if numpy.linalg.matrix_rank([*rows, row]) == len(rows):
            continue  # adds nothing to the shorter ones
        rows, depths = [*rows, row], [*depths, depth]
        if sum(depths) >= len(kinds):
            break
        if numpy.linalg.matrix_rank([*rows, whole]) == len(rows):
            return depths, numpy.linalg.lstsq(numpy.array(rows).T, whole)[0].tolist()
    return [len(kinds)], [1.0]
