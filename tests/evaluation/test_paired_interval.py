"""Intervals of a change hold the truth as often as they claim."""

import numpy as np
import pytest

from lorakit.evaluation.paired_interval import aggregate_interval, mean_interval


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_rows():
    random = np.random.default_rng(1)
    differences = random.choice([-1.0, 0.0, 1.0], 2000, p=[0.1, 0.6, 0.3])
    low, high = mean_interval(differences)
    error = differences.std() / len(differences) ** 0.5
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_nineteen_of_twenty_intervals_hold_the_true_change():
    random = np.random.default_rng(2)
    held = 0
    for number in range(200):
        low, high = mean_interval(random.normal(0.3, 1.0, 60), seed=number)
        held += low <= 0.3 <= high
    assert 180 <= held <= 198


def test_pairs_that_change_alike_have_a_narrow_interval():
    """The reason for pairing: rows differ much, their change does not."""
    base = np.random.default_rng(3).normal(0, 10, 100)
    low, high = mean_interval((base + 0.5) - base)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)


def test_one_row_has_no_interval():
    assert mean_interval([1.0]) is None
    assert aggregate_interval([1.0], [2.0], sum) is None


def test_any_aggregate_has_an_interval_around_its_change():
    random = np.random.default_rng(4)
    base = random.normal(0, 1, 200)
    tuned = base + random.normal(0.2, 0.1, 200)
    low, high = aggregate_interval(list(base), list(tuned), lambda rows: float(np.mean(rows)))
    same = mean_interval(tuned - base)
    assert (low, high) == pytest.approx(same, abs=0.01)
