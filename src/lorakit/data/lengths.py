"""Lengths of examples in tokens enter; a histogram and what batching would waste leave."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Widths of histogram bars: round numbers, so that the borders can be said aloud.
_ROUND = (1, 2, 5, 10, 20, 25, 50)
BARS = 12


@dataclass(frozen=True, slots=True)
class Bar:
    """`count` examples of `begin` to `end` tokens, both ends included."""

    begin: int
    end: int
    count: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the examples are. The wasted shares are of all positions a run computes.

    `padding_waste` is for batches of `batch` examples in random order, `packing_waste` for
    examples put together into rows of `cutoff_len`, of which there would be `packed_rows`.
    """

    examples: int
    shortest: int
    median: int
    p95: int
    longest: int
    cutoff_len: int
    bars: tuple[Bar, ...]
    batch: int
    padding_waste: float
    packed_rows: int
    packing_waste: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def measure(lengths: Sequence[int], cutoff_len: int, batch: int, seed: int = 0) -> Lengths:
    """The figures of examples of these lengths (at least one).

    Args:
        cutoff_len: the longest row a run makes.
        batch: examples that go through the model at once.
        seed: of the order in which examples meet in batches.
    """
    ordered = sorted(lengths)
    rows = packed_rows(ordered, cutoff_len)
    return Lengths(
        examples=len(ordered),
        shortest=ordered[0],
        median=ordered[len(ordered) // 2],
        p95=ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        longest=ordered[-1],
        cutoff_len=cutoff_len,
        bars=_bars(ordered),
        batch=batch,
        padding_waste=_padding_waste(lengths, batch, seed),
        packed_rows=rows,
        packing_waste=1 - sum(ordered) / (rows * max(cutoff_len, ordered[-1])),
    )


def packed_rows(lengths: Sequence[int], room: int) -> int:
    """Rows of `room` tokens that best-fit packing, longest first, needs for `lengths`."""
    left: dict[int, int] = {}  # free tokens -> how many rows have so many
    sizes: list[int] = []  # its keys, in order
    rows = 0
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(sizes, length)
        if at == len(sizes):
            rows += 1
            rest = max(room - length, 0)
        else:
            free = sizes[at]
            left[free] -= 1
            if not left[free]:
                del left[free], sizes[at]
            rest = free - length
        if rest:
            if rest not in left:
                bisect.insort(sizes, rest)
            left[rest] = left.get(rest, 0) + 1
    return rows


def _padding_waste(lengths: Sequence[int], batch: int, seed: int) -> float:
    order = list(lengths)
    random.Random(seed).shuffle(order)
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return 1 - sum(order) / sum(max(part) * len(part) for part in parts)


def _bars(ordered: Sequence[int]) -> tuple[Bar, ...]:
    low, high = ordered[0], ordered[-1]
    width, scale = 0, 1
    while not width:
        fitting = [w * scale for w in _ROUND if (high // (w * scale) - low // (w * scale)) < BARS]
        width, scale = min(fitting, default=0), scale * 10
    first = low // width
    counts = [0] * (high // width - first + 1)
    for length in ordered:
        counts[length // width - first] += 1
    return tuple(
        Bar((first + i) * width, (first + i + 1) * width - 1, count)
        for i, count in enumerate(counts)
    )
