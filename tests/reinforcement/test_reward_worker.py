"""The functions of the child process, called here."""

from pathlib import Path

import pytest

from lorakit.reinforcement.reward_worker import (
    UnusableFunction,
    accepted,
    as_numbers,
    load_function,
    reply_to,
)


def test_a_function_gets_the_columns_that_it_names():
    values = {"prompts": [], "completions": ["a"], "answer": ["b"]}
    assert accepted(lambda completions, answer: 0, values) == {
        "completions": ["a"],
        "answer": ["b"],
    }
    assert accepted(lambda **everything: 0, values) == values


def test_a_file_without_the_function_names_those_that_it_has(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def score(completions): return []\n")
    with pytest.raises(UnusableFunction, match=r"no function other \(found: score\)"):
        load_function({"file": str(path), "function": "other"})


def test_a_file_that_cannot_be_imported_names_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nraise KeyError('oh')\n")
    with pytest.raises(UnusableFunction, match=r"KeyError: 'oh' \(broken.py, line 2\)"):
        load_function({"file": str(path), "function": "f"})


def test_a_pattern_that_is_none():
    with pytest.raises(UnusableFunction, match="not a regular expression"):
        load_function({"pattern": "("})


def test_replies():
    def fails(completions):
        raise ValueError("no")

    assert reply_to(lambda completions: (1, 2.5), {"completions": []}, None) == {"values": [1, 2.5]}
    assert reply_to(fails, {"completions": []}, Path("x")) == {"error": "raised ValueError: no"}
    reply = reply_to(lambda completions: 3, {"completions": ["a"]}, None)
    assert reply == {"error": "returned int, expected a list of 1 numbers"}


def test_arrays_become_numbers():
    import numpy as np

    assert as_numbers(np.array([1.0, 2.0])) == [1.0, 2.0]
    assert as_numbers([np.float32(0.5), None]) == [0.5, None]
    assert as_numbers("text") == "str"
