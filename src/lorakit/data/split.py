"""Choose held-out rows by content hash and seed.

The choice depends on the content of the rows and the seed, not on their order, so that a re-sorted
file keeps its split. Equal rows stay on one side: a held-out copy of a trained row would not
measure generalization.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import DataError


def split(marks: NDArray[np.uint64], held_out: float | int, seed: int) -> NDArray[np.bool_]:
    """Mask of the held-out rows, bool [N].

    Args:
        marks: content hash of each row, see `issues.content_hash`.
        held_out: a share (below 1) or a number of rows; 0 holds out nothing.

    Raises:
        DataError: one side would be empty.
    """
    count = len(marks)
    if not held_out:
        return np.zeros(count, bool)
    row_count = max(1, round(held_out * count)) if held_out < 1 else int(held_out)
    if row_count >= count:
        raise DataError(
            f"val_size {held_out}: {count} usable row{'s' * (count != 1)} cannot be split into "
            f"{row_count} held out and at least 1 to train on",
            hint="give more rows, a smaller val_size, or val_size: 0 to train without evaluation",
        )
    unique, inverse, copies = np.unique(marks, return_inverse=True, return_counts=True)
    chosen = _choose(unique, copies, row_count, seed)
    if not chosen.any():
        raise DataError(
            f"val_size {held_out}: {row_count} rows cannot be held out: nearly all rows are copies "
            "of one another",
            hint="remove the duplicates, or set val_size: 0",
        )
    return chosen[inverse]


def shuffled(marks: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
    """Row indices in an order that depends only on content and seed."""
    # The seed is mixed first: seeds 1 and 2 must not give similar orders.
    salt = _mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(_mix(marks ^ salt), kind="stable")


def _choose(
    unique: NDArray[np.uint64], copies: NDArray[np.int64], row_count: int, seed: int
) -> NDArray[np.bool_]:
    """Choose hashes of `row_count` rows in seeded order, or fewer if copies do not fit."""
    chosen = np.zeros(len(unique), bool)
    remaining = row_count
    for index in shuffled(unique, seed):
        if copies[index] <= remaining:
            chosen[index] = True
            remaining -= int(copies[index])
        if not remaining:
            break
    return chosen


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64: each input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
