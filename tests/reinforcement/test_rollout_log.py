"""Metrics and examples of rollouts."""

import math

import pytest
from tests.reinforcement.test_rollout_batch import batch, scored

from lorakit.reinforcement.policy_loss import SUMS
from lorakit.reinforcement.rollout_log import (
    loss_metrics,
    mean_metrics,
    rollout_metrics,
    shown_rollouts,
)

MADE = batch(scored(1.0, 2), scored(0.0, 4, True), scored(0.5, 2), scored(0.5, 2))


def test_metrics_of_a_rollout():
    metrics = rollout_metrics(MADE, ["f"])
    assert metrics["reward"] == metrics["rewards/f"] == 0.5
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["completions/mean_length"] == 2.5
    assert metrics["completions/max_length"] == 4
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["entropy"] == 1.0
    assert "completions/unscored" not in metrics


def test_completions_without_reward_are_counted():
    metrics = rollout_metrics(batch(scored(1.0, 2), scored(math.nan, 2)), ["f"])
    assert metrics["completions/unscored"] == 0.5
    assert metrics["reward"] == 1.0


def test_means_over_tokens_and_steps():
    sums = dict(zip(SUMS, (10, 1.0, 2, 3, 0.5, 5), strict=True))
    found = loss_metrics(list(sums.values()), beta=0.1)
    assert found["kl"] == 0.1
    assert found["clip_ratio/high_mean"] == pytest.approx(0.3)
    assert found["sampling/masked"] == 0.5
    assert "kl" not in loss_metrics(list(sums.values()), beta=0)
    assert loss_metrics([0.0] * len(SUMS), 0.1) == {}
    assert mean_metrics([{"a": 1.0}, {"a": 3.0, "b": math.nan}]) == {"a": 2.0}


def test_the_best_and_the_worst_completion_are_kept():
    rows = shown_rollouts(3, MADE, ["first?", "second?"], ["f"])
    assert [(r["prompt"], r["reward"]) for r in rows] == [
        ("first?", 1.0), ("first?", 0.0), ("second?", 0.5), ("second?", 0.5),
    ]  # fmt: skip
    assert rows[1]["cut"]
    assert rows[0]["rewards"] == {"f": 1.0}
