"""Lengths and a capacity enter; groups leave that fill micro-batches without padding.

Packing changes how the examples of one optimizer step are laid out, never which they are: the step
has the recipe's number of examples, their tokens go through the model in as few micro-batches as
hold them, and each document sees only itself.
"""

from __future__ import annotations

from collections.abc import Sequence


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


def saved_share(lengths: Sequence[int], rows: int) -> float:
    """Share of tokens that would be padding in micro-batches of `rows` examples in this order."""
    padded = sum(
        max(lengths[start : start + rows]) * len(lengths[start : start + rows])
        for start in range(0, len(lengths), rows)
    )
    return 1 - sum(lengths) / padded if padded else 0.0
