"""Figures of toy lengths that one can work out by hand, and bounds that hold for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.inspection import BARS, measure

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=60)


def test_figures_of_five_examples():
    found = measure([10, 20, 30, 40, 100], cutoff_len=100, batch=1, step=4)
    assert (found.shortest, found.median, found.p95, found.longest) == (10, 30, 100, 100)
    assert found.padding == 0.0
    assert [(bar.begin, bar.end, bar.count) for bar in found.bars][:4] == [
        (10, 19, 1), (20, 29, 1), (30, 39, 1), (40, 49, 1),
    ]  # fmt: skip


def test_padding_is_what_the_longest_of_a_batch_costs_the_others():
    assert measure([10, 30], cutoff_len=64, batch=2, step=2).padding == pytest.approx(1 / 3)


def test_figures_of_a_hundred_examples():
    found = measure([*range(50, 101), *range(1, 50)], cutoff_len=100, batch=1, step=4)
    assert (found.shortest, found.median, found.p95, found.longest) == (1, 51, 96, 100)


def test_padding_is_that_of_a_random_order():
    """Side by side in the order of their lengths these would need none."""
    found = measure([10] * 50 + [100] * 50, cutoff_len=100, batch=2, step=4)
    # Half of the pairs are uneven, and 45% of each of those is padding.
    assert found.padding == pytest.approx(0.29, abs=0.1)


@given(LENGTHS, st.integers(1, 8))
def test_bars_cover_all_and_shares_are_shares(lengths, batch):
    found = measure(lengths, cutoff_len=5000, batch=batch, step=2 * batch)
    assert sum(bar.count for bar in found.bars) == len(lengths)
    assert len(found.bars) <= BARS
    assert all(a.end + 1 == b.begin for a, b in zip(found.bars, found.bars[1:], strict=False))
    assert found.bars[0].begin <= min(lengths) <= max(lengths) <= found.bars[-1].end
    assert 0 <= found.padding < 1


def test_packed_micro_batches_are_counted_per_step():
    assert measure([60, 30, 10] * 4, cutoff_len=100, batch=1, step=12).packed == 4
    assert measure([60] * 4, cutoff_len=100, batch=2, step=4).packed == 2
    assert measure([90, 90, 90], cutoff_len=100, batch=1, step=3).packed == 3
