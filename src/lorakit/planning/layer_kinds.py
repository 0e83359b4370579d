"""Group decoder layers by kind, and choose how many of them to run to predict all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from lorakit.model.base_class import empty_base
from lorakit.model.layer_widths import decoder_layers


def layer_kinds(config: Any) -> list[Hashable]:
    """Key of each decoder layer's kind: its modules and the shapes of its weights."""
    layers = decoder_layers(empty_base(config)) or ()
    return [
        (
            tuple(type(module).__name__ for module in layer.modules()),
            tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()),
        )
        for layer in layers
    ]


def depths_to_run(kinds: Sequence[Hashable]) -> tuple[list[int], list[float]]:
    """Choose the depths to run and the weight of each run in the sum.

    The bytes of the first n layers are `fixed + sum over kinds of count x bytes`, so the complete
    model is a weighted sum of runs once its counts are a combination of theirs: of 32 equal layers,
    31 x (2) - 30 x (1).

    Returns:
        (numbers of first layers to run, weight of each run).
    """
    import numpy

    names = list(dict.fromkeys(kinds))
    target = [1, *(kinds.count(name) for name in names)]
    rows: list[list[int]] = []
    depths: list[int] = []
    for depth in range(1, len(kinds)):
        row = [1, *(kinds[:depth].count(name) for name in names)]
        if numpy.linalg.matrix_rank([*rows, row]) == len(rows):
            continue  # linearly dependent on the shorter runs
        rows, depths = [*rows, row], [*depths, depth]
        if sum(depths) >= len(kinds):
            break
        if numpy.linalg.matrix_rank([*rows, target]) == len(rows):
            return depths, numpy.linalg.lstsq(numpy.array(rows).T, target)[0].tolist()
    return [len(kinds)], [1.0]
