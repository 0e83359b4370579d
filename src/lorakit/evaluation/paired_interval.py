"""Confidence intervals of a change, from the differences of the same rows.

Base and tuned answer the same rows, so the rows' difficulty cancels in the differences. The
interval is the percentile bootstrap: rows are drawn with replacement, and the change is computed
for each draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SLOW_RESAMPLES = 2000, 500
LEVEL = 95.0
_AT_ONCE = 2_000_000  # drawn rows in memory


def mean_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Interval of the mean difference; None for less than two rows."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return None
    random = np.random.default_rng(seed)
    means: list[NDArray[Any]] = []
    step = max(1, _AT_ONCE // len(values))
    for begin in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - begin)
        drawn = random.integers(0, len(values), (count, len(values)))
        means.append(values[drawn].mean(axis=1))
    return _percentiles(np.concatenate(means))


def aggregate_interval(
    base: Sequence[Any],
    tuned: Sequence[Any],
    aggregate: Callable[[list[Any]], float],
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of the change of any aggregate of rows, such as a corpus BLEU or a perplexity."""
    if len(base) < 2:
        return None
    random = np.random.default_rng(seed)
    changes = []
    for _ in range(SLOW_RESAMPLES):
        drawn = random.integers(0, len(base), len(base)).tolist()
        change = aggregate([tuned[i] for i in drawn]) - aggregate([base[i] for i in drawn])
        changes.append(float(change))
    return _percentiles(np.asarray(changes))


def _percentiles(values: NDArray[Any]) -> tuple[float, float]:
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
