"""The split is seeded, follows content and not order, and never parts equal rows."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.issues import content_hash
from lorakit.data.split import shuffled
from lorakit.data.split import split as held_rows
from lorakit.errors import DataError
from lorakit.types import Document, Origin

ROWS = [f"row {i}" for i in range(100)]


def split(rows, held_out, seed):
    marks = np.array([content_hash(Document(row, Origin("x", 1))) for row in rows], np.uint64)
    out = held_rows(marks, held_out, seed)
    return tuple([r for r, h in zip(rows, out, strict=True) if h == side] for side in (False, True))


def test_a_share_and_a_number_hold_out_as_many():
    for held_out, count in ((0.05, 5), (0.001, 1), (1, 1), (7, 7), (99, 99), (0.99, 99), (0, 0)):
        train, held = split(ROWS, held_out, 42)
        assert (len(held), len(train)) == (count, 100 - count)
        assert sorted(train + held) == sorted(ROWS)


def test_the_same_seed_chooses_the_same_rows_in_any_order():
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert set(split(ROWS, 0.2, 42)[1]) == set(split(shuffled, 0.2, 42)[1])
    assert set(split(ROWS, 0.2, 42)[1]) != set(split(ROWS, 0.2, 43)[1])


def test_both_parts_keep_the_order_of_the_file():
    for part in split(ROWS, 0.3, 42):
        assert part == sorted(part, key=ROWS.index)


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30), st.integers(1, 5))
def test_equal_rows_stay_on_one_side(rows, wanted):
    try:
        train, held = split(rows, wanted, 0)
    except DataError:
        return
    assert not set(train) & set(held)
    assert 1 <= len(held) <= wanted
    assert train


@pytest.mark.parametrize(("rows", "held_out"), [(["a"], 0.05), (ROWS, 100), (["a"] * 9, 2)])
def test_an_empty_side_is_refused_with_a_hint(rows, held_out):
    with pytest.raises(DataError, match="val_size") as caught:
        split(rows, held_out, 42)
    assert "val_size: 0" in caught.value.hint


def test_seeds_give_unrelated_orders():
    marks = np.arange(1000, dtype=np.uint64)
    one, two = shuffled(marks, 1), shuffled(marks, 2)
    assert sorted(one) == sorted(two) == list(range(1000))
    assert (one == two).sum() < 10


def test_neighboring_seeds_give_orders_that_are_no_shift_of_one_another():
    """On consecutive marks a seed that is only added or xored gives the same order, permuted."""
    marks = np.arange(1024, dtype=np.uint64)
    one, two = shuffled(marks, 1), shuffled(marks, 2)
    for relation in (one ^ two, (one - two) % 1024):
        # Unrelated orders relate at random: 1,024 draws of 1,024 values have some 650 different.
        assert len(np.unique(relation)) > 500
