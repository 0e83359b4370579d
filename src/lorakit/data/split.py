"""Items, a share or number and a seed enter; the part to train on and the held-out part leave.

Which items are held out depends on their content and the seed, not on their order, so that a file
sorted anew keeps its split. Equal items stay on one side: a held-out copy of a trained row would
say nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from lorakit.errors import DataError

Item = TypeVar("Item")


def split(
    items: Sequence[Item], held_out: float | int, seed: int, mark: Callable[[Item], str]
) -> tuple[list[Item], list[Item]]:
    """(train, held out), each in the order of `items`.

    Args:
        held_out: a share (below 1) or a number of items; 0 holds out nothing.
        mark: content hash of an item, see `check.fingerprint`.

    Raises:
        DataError: one side would be empty.
    """
    if not held_out:
        return list(items), []
    count = len(items)
    wanted = max(1, round(held_out * count)) if held_out < 1 else int(held_out)
    if wanted >= count:
        raise DataError(
            f"val_size {held_out}: {count} usable row{'s' * (count != 1)} cannot be split into "
            f"{wanted} held out and at least 1 to train on",
            hint="give more rows, a smaller val_size, or val_size: 0 to train without evaluation",
        )
    marks = [mark(item) for item in items]
    chosen = _choose(Counter(marks), wanted, seed)
    train = [item for item, m in zip(items, marks, strict=True) if m not in chosen]
    held = [item for item, m in zip(items, marks, strict=True) if m in chosen]
    if not held:
        raise DataError(
            f"val_size {held_out}: no {wanted} rows can be held out: nearly all rows are copies of "
            "one another",
            hint="remove the duplicates, or set val_size: 0",
        )
    return train, held


def _choose(copies: Counter[str], wanted: int, seed: int) -> set[str]:
    """Marks in seeded order whose items are `wanted` in number, fewer where copies do not fit."""
    order = sorted(copies, key=lambda m: hashlib.sha256(f"{seed} {m}".encode()).digest())
    chosen: set[str] = set()
    room = wanted
    for mark in order:
        if copies[mark] <= room:
            chosen.add(mark)
            room -= copies[mark]
        if not room:
            break
    return chosen
