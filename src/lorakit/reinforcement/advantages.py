"""Advantages of completions from the rewards of their group, and the rewards' statistics.

    A_i = (r_i - mean of the group) / (std + 1e-4)        std of the group, of the step, or none

A group is all completions of one prompt. A completion that no function could score (NaN) is left
out of mean and std, and has advantage 0.

Shapes: P prompts, G completions of each, F reward functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-4
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Rewards and advantages [P, G] of a step; `varied` [P] is false where rewards are equal."""

    rewards: Floats
    advantages: Floats
    varied: NDArray[np.bool_]

    @property
    def zero_variance(self) -> float:
        """Share of groups from which nothing is learned."""
        return float(1 - self.varied.mean())


def weighted_rewards(parts: Floats, weights: Sequence[float]) -> Floats:
    """Sum the rewards of all functions [..., F] by weight; NaN where no function has a value."""
    total = np.nansum(parts * np.asarray(weights, np.float64), axis=-1)
    return np.where(np.isnan(parts).all(axis=-1), np.nan, total)


def group_scores(rewards: Floats, scale: str = "group") -> GroupScores:
    """Compute the advantages of rewards [P, G].

    Args:
        scale: "group", "batch" (the step), or "none".
    """
    known = ~np.isnan(rewards)
    mean = _mean(rewards, known)
    centered = np.where(known, rewards - mean[:, None], 0.0)
    counts = known.sum(axis=1)
    group = np.sqrt((centered**2).sum(axis=1) / np.maximum(counts - 1, 1))
    varied = ~np.isclose(group, 0.0)
    advantages = centered
    if scale == "group":
        advantages = centered / (group[:, None] + EPSILON)
    elif scale == "batch":
        values = rewards[known]
        std = values.std(ddof=1) if len(values) > 1 else 0.0
        advantages = centered / (std + EPSILON)
    # Rounding of a mean must not become a direction: equal rewards have advantage 0 exactly.
    return GroupScores(rewards, np.where(varied[:, None], advantages, 0.0), varied)


def _mean(rewards: Floats, known: NDArray[np.bool_]) -> Floats:
    total = np.where(known, rewards, 0.0).sum(axis=1)
    return np.asarray(total / np.maximum(known.sum(axis=1), 1))
