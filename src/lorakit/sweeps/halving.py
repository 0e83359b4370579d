"""Successive halving (arXiv 1502.07943): after a part of the steps, stop the worse half.

With four configurations: all train a quarter of their steps, two of them half, one to the end:
twice the steps of one run. A configuration's loss is the mean of the held-out losses of its seeds,
so no seed's split decides alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Before an eighth of the steps, warm-up and the full rate hide which settings are better.
MOST_RUNGS = 3


def rung_shares(configurations: int, shortest: int) -> list[float]:
    """Shares of a run's steps after which the worse half stops, ascending.

    Args:
        shortest: steps of the shortest run; a share below one of its steps is left out.
    """
    rungs = min(MOST_RUNGS, math.ceil(math.log2(max(1, configurations))))
    shares = [2.0**-number for number in range(rungs, 0, -1)]
    return [share for share in shares if share * shortest >= 1]


def rung_step(share: float, steps: int) -> int:
    """The step of a rung in a run of `steps` steps."""
    return max(1, int(share * steps))


def mean_loss(losses: Sequence[float | None]) -> float:
    """Mean over seeds; infinite if a run failed or its loss is not finite."""
    if not losses or any(loss is None or not math.isfinite(loss) for loss in losses):
        return math.inf
    return sum(loss for loss in losses if loss is not None) / len(losses)


def survivors(losses: Mapping[int, float]) -> list[int]:
    """The better half of configurations by loss, at least one, in their order.

    Equal losses keep the earlier configuration; an infinite loss is never kept.
    """
    ranked = sorted(losses, key=lambda number: (losses[number], number))
    kept = [number for number in ranked[: -(-len(ranked) // 2)] if math.isfinite(losses[number])]
    return sorted(kept)
