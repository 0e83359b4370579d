"""Examples and a layout enter; the heaviest micro-batch that they can make leaves.

Run before the first step, it shows in a second what would else show in hour three, when the longest
examples happen to meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.batch import Layout, StepBatch, step_batches
from lorakit.data.shelf import lengths_of
from lorakit.records import Example, MemoryPlan


def worst_step(examples: Sequence[Example], layout: Layout, per_step: int) -> StepBatch:
    """A step of one micro-batch: the longest rows side by side, or a pack filled with the longest.

    Args:
        per_step: examples of an optimizer step; a micro-batch holds no more.
    """
    sizes = np.asarray(lengths_of(examples), np.int64)
    order = np.argsort(-sizes, kind="stable")
    if not layout.packed:
        chosen = order[: min(layout.rows, per_step)].tolist()
    else:
        chosen = _fill(sizes[order], order, layout.capacity, per_step)
    return step_batches([examples[i] for i in chosen], layout)


def longest_scored(examples: Sequence[Example], batch_tokens: int) -> list[Example]:
    """The heaviest batch that scoring these examples makes."""
    sizes = lengths_of(examples)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return [examples[i] for i in order[: max(1, batch_tokens // sizes[order[0]])]]


def room_for_optimizer(optimizer: Any, plan: MemoryPlan, device: torch.device) -> Tensor | None:
    """Memory that the first update will take, held until then; None where it is taken already."""
    if device.type != "cuda" or optimizer is None or optimizer.state:
        return None
    size = plan.parts.get("optimizer state", 0)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _fill(
    sizes: NDArray[np.int64], order: NDArray[np.int64], capacity: int, count: int
) -> list[int]:
    """Longest first, each as long as room is left; the longest of all in any case."""
    chosen, room, place = [int(order[0])], capacity - int(sizes[0]), 1
    while len(chosen) < count and place < len(sizes):
        # Sizes fall: the first one that fits.
        place = max(place, int(np.searchsorted(-sizes, -room)))
        if place >= len(sizes):
            break
        chosen.append(int(order[place]))
        room -= int(sizes[place])
        place += 1
    return chosen
