"""Metrics of rollouts and losses, and the examples of rollouts in rollouts.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorakit.reinforcement.policy_loss import SUMS
from lorakit.reinforcement.rollout_batch import RolloutBatch, ScoredCompletion

# Completions of a logged step that are kept: the best and the worst of its first groups.
KEPT_GROUPS = 2
MOST_CHARACTERS = 4000


def rollout_metrics(batch: RolloutBatch, names: Sequence[str]) -> dict[str, float]:
    """Metrics of a rollout, by TRL's names.

    Args:
        names: those of the reward functions.
    """
    completions = batch.completions
    rewards = np.array([c.reward for c in completions])
    lengths = [len(c.completion.ids) for c in completions]
    tokens = sum(lengths)
    metrics = {
        "reward": _nanmean(rewards),
        "reward_std": _nanstd(rewards),
        "frac_reward_zero_std": batch.scores.zero_variance,
        "completions/mean_length": tokens / len(completions),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": statistics.fmean(c.completion.truncated for c in completions),
        "entropy": sum(c.completion.entropy * len(c.completion.ids) for c in completions) / tokens,
    }
    parts = np.array([c.parts for c in completions])
    for column, name in enumerate(names):
        metrics[f"rewards/{name}"] = _nanmean(parts[:, column])
        metrics[f"rewards/{name}/std"] = _nanstd(parts[:, column])
    if unscored := int(np.isnan(rewards).sum()):
        metrics["completions/unscored"] = unscored / len(completions)
    return metrics


def loss_metrics(sums: Sequence[float], beta: float) -> dict[str, float]:
    """Means over the trained tokens of a step from `policy_loss.SUMS`."""
    total = dict(zip(SUMS, sums, strict=True))
    tokens = total["tokens"]
    if not tokens:
        return {}
    metrics = {
        "clip_ratio/low_mean": total["clipped_low"] / tokens,
        "clip_ratio/high_mean": total["clipped_high"] / tokens,
        "sampling/logp_difference": total["sampler_difference"] / tokens,
        "sampling/masked": total["corrected_away"] / tokens,
    }
    return {**metrics, "kl": total["kl"] / tokens} if beta else metrics


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the steps that have it and have a value."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {n: [r[n] for r in rows if n in r and math.isfinite(r[n])] for n in names}
    return {name: statistics.fmean(values) for name, values in found.items() if values}


def shown_rollouts(
    step: int, batch: RolloutBatch, questions: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The best and the worst completion of the first groups, as rows of rollouts.jsonl.

    Args:
        questions: last turn of each prompt.
    """
    size = batch.scores.rewards.shape[1]
    rows = []
    for group, question in enumerate(questions[:KEPT_GROUPS]):
        members = batch.completions[group * size : (group + 1) * size]
        advantages = batch.advantages[group * size : (group + 1) * size]
        ranked = sorted(range(size), key=lambda i: -np.nan_to_num(members[i].reward, nan=-np.inf))
        rows += [
            _row(step, question, members[place], advantages[place], names)
            for place in dict.fromkeys((ranked[0], ranked[-1]))
        ]
    return rows


def _row(
    step: int, question: str, scored: ScoredCompletion, advantage: float, names: Sequence[str]
) -> dict[str, Any]:
    return {
        "step": step,
        "from": str(scored.origin),
        "prompt": question[:MOST_CHARACTERS],
        "completion": scored.text[:MOST_CHARACTERS],
        "reward": _number(scored.reward),
        "rewards": {n: _number(v) for n, v in zip(names, scored.parts, strict=True)},
        "advantage": round(advantage, 4),
        "tokens": len(scored.completion.ids),
        "cut": scored.completion.truncated,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _nanmean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _nanstd(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0
