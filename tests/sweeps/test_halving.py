"""Which configurations go on after a part of the steps."""

import math

import pytest

from lorakit.sweeps.halving import mean_loss, rung_shares, rung_step, survivors


@pytest.mark.parametrize(
    ("configurations", "shares"),
    [(1, []), (2, [0.5]), (3, [0.25, 0.5]), (4, [0.25, 0.5]), (8, [0.125, 0.25, 0.5])],
)
def test_rungs_end_with_one_configuration(configurations, shares):
    assert rung_shares(configurations, 100) == shares
    left = configurations
    for _ in shares:
        left = -(-left // 2)
    assert left == 1


def test_no_rung_is_before_an_eighth_or_the_first_step():
    assert rung_shares(100, 100) == [0.125, 0.25, 0.5]
    assert rung_shares(100, 5) == [0.25, 0.5]
    assert rung_shares(2, 1) == []
    assert [rung_step(share, 60) for share in (0.125, 0.25, 0.5)] == [7, 15, 30]


def test_four_configurations_take_twice_the_steps_of_one():
    first, second = (rung_step(share, 60) for share in rung_shares(4, 60))
    assert 4 * first + 2 * (second - first) + (60 - second) == 120


def test_the_better_half_goes_on_in_its_order():
    assert survivors({0: 3.0, 1: 1.0, 2: 2.0, 3: 4.0}) == [1, 2]
    assert survivors({0: 3.0, 1: 1.0, 2: 2.0}) == [1, 2]
    assert survivors({5: 1.0, 3: 1.0}) == [3]
    assert survivors({7: 2.0}) == [7]


def test_failed_configurations_never_go_on():
    assert survivors({0: math.inf, 1: math.inf, 2: 9.0, 3: math.inf}) == [2]
    assert survivors({0: math.inf}) == []
    assert mean_loss([1.0, 3.0]) == 2.0
    assert mean_loss([1.0, None]) == mean_loss([math.nan, 1.0]) == mean_loss([]) == math.inf
