"""Faults of a file become one error: ten are told, the rest counted, and none gets lost."""

from functools import partial

import pytest

from lorakit.data.sources.files import SHOWN_FAULTS, LineErrors
from lorakit.errors import DataError


def collect(faults, last=None):
    """The error of a file whose lines 1, 2, ... have these (message, hint)."""
    with pytest.raises(DataError) as caught, LineErrors("a") as broken:
        for place, fault in enumerate(faults, 1):
            broken.add(place, partial(DataError, *fault))
        if last:
            raise last
    return caught.value


def test_a_file_without_faults_raises_nothing_and_its_end_is_its_own():
    with LineErrors("a") as broken:
        assert broken.count == 0
    own = DataError("gone")
    assert collect([], own) is own


def test_a_lone_fault_is_told_as_it_is():
    error = collect([("a:1: x", "mend it")])
    assert (error.message, error.hint) == ("a:1: x", "mend it")
    assert collect([("a:1: x", None)]).hint is None


def test_what_is_not_shown_is_not_even_made():
    made = []

    def fault():
        made.append(1)
        return DataError("x")

    with pytest.raises(DataError) as caught, LineErrors("a") as broken:
        for place in range(1, 1001):
            broken.add(place, fault)
    assert caught.value.message.startswith("a: 1,000 faults:")
    assert caught.value.message.endswith("and 990 more")
    assert len(made) == SHOWN_FAULTS


def test_a_line_counts_once():
    with pytest.raises(DataError) as caught, LineErrors("a") as broken:
        broken.add(3, lambda: DataError("cause"))
        broken.add(3, lambda: DataError("effect"))
    assert caught.value.message == "cause"


def test_the_same_advice_for_other_lines_is_told_once():
    error = collect([("x", "sed -n 1p a"), ("y", "sed -n 2p a"), ("z", "iconv a"), ("z", None)])
    assert error.hint.splitlines() == ["sed -n 1p a", "  iconv a"]


def test_what_ends_the_reading_is_told_after_the_count():
    lines = collect([("x", None)] * 12, DataError("torn", "get it anew"))
    assert lines.message.splitlines()[-2:] == ["  and 2 more", "  torn"]
    assert lines.message.startswith("a: 13 faults:")
    assert lines.hint == "get it anew"


def test_a_bug_or_an_interruption_is_no_fault_of_the_file():
    with pytest.raises(KeyboardInterrupt), LineErrors("a") as broken:
        broken.add(1, lambda: DataError("x"))
        raise KeyboardInterrupt
