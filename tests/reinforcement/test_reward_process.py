"""A reward function in a child process: results, faults, time limits."""

import time
from types import SimpleNamespace

import pytest

from lorakit.errors import RecipeError, WorkError
from lorakit.reinforcement.reward_process import FileReward, RegexReward

SOURCE = """
import os, time
def lengths(completions, answer, **more):
    print("noise on the output")
    return [float(len(c) + len(a)) for c, a in zip(completions, answer)]
def hangs(completions): time.sleep(60)
def dies(completions): os._exit(3)
def raises(completions): raise ZeroDivisionError("by zero")
"""


def attempt(text, **fields):
    return SimpleNamespace(prompt=[], text=text, ids=[1], fields=fields)


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return lambda name, seconds=30.0: FileReward(path, name, seconds)


def test_columns_go_to_the_function_and_numbers_come_back(own):
    reward = own("lengths")
    assert reward([attempt("abc", answer="d"), attempt("", answer="ef")]) == [4.0, 2.0]
    big = "x" * 300_000  # more than a pipe holds
    assert reward([attempt(big, answer="")]) == [300_000.0]


@pytest.mark.parametrize(
    ("name", "seconds", "words"),
    [
        ("hangs", 0.5, "did not finish within 0.5 s"),
        ("dies", 30.0, r"its process ended \(exit code 3\)"),
        ("raises", 30.0, r"raised ZeroDivisionError: by zero \(mine.py, line 8\)"),
    ],
)
def test_faults_are_one_message(own, name, seconds, words):
    began = time.monotonic()
    with pytest.raises(WorkError, match=words):
        own(name, seconds)([attempt("a")])
    assert time.monotonic() - began < 20


def test_a_missing_function_is_a_fault_of_the_recipe(own):
    with pytest.raises(RecipeError, match=r"mine.py:nothing: has no function nothing"):
        own("nothing")


def test_a_pattern_is_searched_with_a_time_limit():
    assert RegexReward(r"\d+$", 30.0)([attempt("is 42"), attempt("none")]) == [1.0, 0.0]
    with pytest.raises(WorkError, match="did not finish"):
        RegexReward(r"(a+)+$", 0.5)([attempt("a" * 40 + "b")])
