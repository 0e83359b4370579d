"""Groups fill micro-batches: nothing lost, nothing over capacity, no more than rows would take."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batching import best_fit, decide_packing, saved_share


@pytest.mark.parametrize("seed", range(20))
def test_every_index_once_and_no_group_over_capacity(seed):
    draw = random.Random(seed)
    capacity = draw.randint(10, 3000)
    lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 70))]
    groups = best_fit(lengths, capacity)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in g) <= capacity for g in groups)
    assert groups == best_fit(lengths, capacity)


def test_a_step_never_takes_more_micro_batches_than_the_recipe_has():
    """16 examples of at most 100 tokens as 4 x 4: any 4 of them fit into 400."""
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 100) for _ in range(16)]
        assert len(best_fit(lengths, 400)) <= 4


def test_the_tightest_group_is_filled_first():
    assert best_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_what_is_over_capacity_stands_alone():
    assert best_fit([12, 3, 4], 10) == [[0], [2, 1]]


def test_share_of_padding():
    assert saved_share([10, 5, 5, 5], 2) == pytest.approx(1 - 25 / 30)
    assert saved_share([], 2) == 0.0


def test_with_a_seed_the_share_is_that_of_a_random_order_as_in_training():
    """In the order of a sorted file long rows meet long ones."""
    lengths = [100] * 32 + [1] * 32
    assert saved_share(lengths, 2) == 0.0
    # Half of the pairs are uneven, and nearly half of each of those is padding.
    assert saved_share(lengths, 2, seed=0) == pytest.approx(0.33, abs=0.1)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 9))
def test_padding_is_what_each_micro_batch_takes_over_its_tokens(lengths, rows):
    parts = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    padded = sum(max(part) * len(part) for part in parts)
    assert saved_share(lengths, rows) == pytest.approx(1 - sum(lengths) / padded)


@pytest.mark.parametrize(
    ("share", "wanted", "cpu", "packs", "said"),
    [
        (0.3, False, False, False, "packing: false"),
        (0.05, True, True, False, "5% would be padding, and on a CPU packing pays above 10%"),
        (0.3, True, True, True, "side by side 30% would be padding"),
        (0.0, True, False, True, "on: "),
    ],
)
def test_whether_a_run_packs_is_said_with_its_reason(share, wanted, cpu, packs, said):
    found, words = decide_packing(share, wanted, cpu)
    assert found == packs
    assert said in words
