"""Lengths and a capacity enter; groups leave that fill micro-batches without padding.

Packing changes how the examples of one optimizer step are laid out, never which they are: the step
has the recipe's number of examples, their tokens go through the model in as few micro-batches as
hold them, and each document sees only itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# On a CPU packed documents cost an attention call each: 0.99 s a demo step against 0.92 s.
PAYS_ABOVE = 0.1


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices, each at most `capacity` tokens together: best-fit decreasing.

    Each group goes where the least room is left. A length over `capacity` gets a group of its own.
    The same lengths always give the same groups.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[index]
        fits = [(left, g) for g, left in enumerate(room) if left >= size]
        if fits:
            left, group = min(fits)
            groups[group].append(index)
            room[group] = left - size
        else:
            groups.append([index])
            room.append(capacity - size)
    return groups


def saved_share(
    lengths: Sequence[int] | NDArray[np.int64], rows: int, seed: int | None = None
) -> float:
    """Share of tokens that would be padding in micro-batches of `rows` examples.

    Args:
        seed: of a random order, as training has it; None for the order given.
    """
    order = np.asarray(lengths, np.int64)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    if not len(order):
        return 0.0
    missing = -len(order) % rows
    widths = np.pad(order, (0, missing)).reshape(-1, rows).max(axis=1)
    padded = int(widths.sum()) * rows - int(widths[-1]) * missing
    return 1 - int(order.sum()) / padded


def packing_words(share: float, wanted: bool, cpu: bool) -> tuple[bool, str]:
    """Whether a run packs where `share` would be padding, and the reason in words."""
    if not wanted:
        return False, "off (packing: false)"
    if cpu and share <= PAYS_ABOVE:
        return False, (
            f"off: {share:.0%} would be padding, and on a CPU packing pays above {PAYS_ABOVE:.0%}"
        )
    return True, f"on: documents share micro-batches; side by side {share:.0%} would be padding"
