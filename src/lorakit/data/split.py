"""Content hashes, a share or number and a seed enter; which rows are held out leaves.

Which rows are held out depends on their content and the seed, not on their order, so that a file
sorted anew keeps its split. Equal rows stay on one side: a held-out copy of a trained row would
say nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import DataError


def split(marks: NDArray[np.uint64], held_out: float | int, seed: int) -> NDArray[np.bool_]:
    """True for each row that is held out, bool [N].

    Args:
        marks: content hash of each row, see `check.fingerprint`.
        held_out: a share (below 1) or a number of rows; 0 holds out nothing.

    Raises:
        DataError: one side would be empty.
    """
    count = len(marks)
    if not held_out:
        return np.zeros(count, bool)
    wanted = max(1, round(held_out * count)) if held_out < 1 else int(held_out)
    if wanted >= count:
        raise DataError(
            f"val_size {held_out}: {count} usable row{'s' * (count != 1)} cannot be split into "
            f"{wanted} held out and at least 1 to train on",
            hint="give more rows, a smaller val_size, or val_size: 0 to train without evaluation",
        )
    known, which, copies = np.unique(marks, return_inverse=True, return_counts=True)
    chosen = _choose(known, copies, wanted, seed)
    if not chosen.any():
        raise DataError(
            f"val_size {held_out}: no {wanted} rows can be held out: nearly all rows are copies of "
            "one another",
            hint="remove the duplicates, or set val_size: 0",
        )
    return chosen[which]


def shuffled(marks: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
    """Numbers of the rows in an order that hangs on content and seed alone."""
    # The seed goes through the mixer first: seeds 1 and 2 must not give neighboring orders.
    salt = _mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(_mix(marks ^ salt), kind="stable")


def _choose(
    known: NDArray[np.uint64], copies: NDArray[np.int64], wanted: int, seed: int
) -> NDArray[np.bool_]:
    """Marks in seeded order whose rows are `wanted` in number, fewer where copies do not fit."""
    chosen = np.zeros(len(known), bool)
    room = wanted
    for number in shuffled(known, seed):
        if copies[number] <= room:
            chosen[number] = True
            room -= int(copies[number])
        if not room:
            break
    return chosen


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the input moves half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
