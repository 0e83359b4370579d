"""Advantages of groups against their definition."""

import numpy as np
import pytest

from lorakit.reinforcement.advantages import group_scores, weighted_rewards

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, 0.0, 0.0, 0.0]])


def test_a_group_is_centered_and_scaled_by_its_deviation():
    scores = group_scores(REWARDS)
    expected = (REWARDS[2] - 0.5) / (REWARDS[2].std(ddof=1) + 1e-4)
    assert np.allclose(scores.advantages[2], expected)
    assert np.allclose(scores.advantages.sum(axis=1), 0)


def test_equal_rewards_give_no_direction():
    scores = group_scores(np.full((2, 8), 0.1))  # the mean of eight 0.1 is not 0.1
    assert not scores.advantages.any()
    assert scores.zero_variance == 1.0
    assert group_scores(REWARDS).zero_variance == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("scale", "divisor"), [("none", 1.0), ("batch", REWARDS.std(ddof=1) + 1e-4)]
)
def test_other_scales(scale, divisor):
    centered = REWARDS - REWARDS.mean(axis=1, keepdims=True)
    assert np.allclose(group_scores(REWARDS, scale).advantages, centered / divisor)


def test_a_completion_without_reward_is_left_out():
    rewards = np.array([[1.0, np.nan, 0.0]])
    scores = group_scores(rewards, "none")
    assert scores.advantages.tolist() == [[0.5, 0.0, -0.5]]


def test_parts_are_summed_by_weight_where_they_have_a_value():
    parts = np.array([[1.0, 0.5], [np.nan, 0.5], [np.nan, np.nan]])
    assert weighted_rewards(parts, [1.0, 2.0])[:2].tolist() == [2.0, 1.0]
    assert np.isnan(weighted_rewards(parts, [1.0, 2.0])[2])
