"""The split is seeded, follows content and not order, and never parts equal rows."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.split import split
from lorakit.errors import DataError

ROWS = [f"row {i}" for i in range(100)]


def test_a_share_and_a_number_hold_out_as_many():
    for held_out, count in ((0.05, 5), (0.001, 1), (7, 7), (0, 0), (0.0, 0)):
        train, held = split(ROWS, held_out, 42, str)
        assert (len(held), len(train)) == (count, 100 - count)
        assert sorted(train + held) == sorted(ROWS)


def test_the_same_seed_chooses_the_same_rows_in_any_order():
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert set(split(ROWS, 0.2, 42, str)[1]) == set(split(shuffled, 0.2, 42, str)[1])
    assert set(split(ROWS, 0.2, 42, str)[1]) != set(split(ROWS, 0.2, 43, str)[1])


def test_both_parts_keep_the_order_of_the_file():
    for part in split(ROWS, 0.3, 42, str):
        assert part == sorted(part, key=ROWS.index)


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30), st.integers(1, 5))
def test_equal_rows_stay_on_one_side(rows, wanted):
    try:
        train, held = split(rows, wanted, 0, str)
    except DataError:
        return
    assert not set(train) & set(held)
    assert 1 <= len(held) <= wanted
    assert train


@pytest.mark.parametrize(("rows", "held_out"), [(["a"], 0.05), (ROWS, 100), (["a"] * 9, 2)])
def test_an_empty_side_is_refused_with_a_hint(rows, held_out):
    with pytest.raises(DataError, match="val_size") as caught:
        split(rows, held_out, 42, str)
    assert "val_size: 0" in caught.value.hint
