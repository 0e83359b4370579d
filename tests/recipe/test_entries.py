"""Reward functions in a recipe: what is accepted, and the sentences of what is not."""

import pytest
from pydantic import ValidationError

from lorakit.recipe.entries import RewardFunction
from lorakit.recipe.schema import Recipe


def recipe(**values):
    usual = {"model": "demo", "data": "d", "objective": "grpo", "reward_funcs": ["exact_answer"]}
    return Recipe.model_validate({**usual, **values})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "a name or a file"),
        ({"name": "regex", "file": "a.py", "function": "f"}, "a name or a file"),
        ({"file": "a.py"}, "file and function belong together"),
        ({"name": "regex"}, "reward regex needs pattern"),
        ({"name": "length"}, "reward length needs limit"),
        ({"name": "exact_answer", "pattern": "a"}, "reward exact_answer has no pattern"),
    ],
)
def test_wrong_entries_are_one_sentence(entry, words):
    with pytest.raises(ValidationError, match=words):
        RewardFunction(**entry)


def test_an_entry_survives_its_own_dump():
    entry = RewardFunction(name="length", limit=9, buffer=3, label="short")
    assert RewardFunction.model_validate(entry.model_dump()) == entry
    assert entry.shown == "short"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"reward_funcs": []}, "needs reward_funcs"),
        ({"reward_funcs": ["regex"]}, r"needs its settings: \{name: regex, pattern: ...\}"),
        (
            {"num_generations": 5},
            "is 32 completions, expected a multiple",
        ),
        ({"cutoff_len": 512}, "leaves no tokens for a prompt"),
        ({"objective": "sft"}, "reward_funcs has no effect with objective: sft"),
    ],
)
def test_wrong_recipes_are_one_sentence(values, words):
    with pytest.raises(ValidationError, match=words):
        recipe(**values)


def test_columns_that_functions_read():
    names = {
        "exact_answer": "answer", "numeric_answer": "answer", "unit_tests": "tests",
        "json_schema": "schema",
    }  # fmt: skip
    for name, column in names.items():
        assert RewardFunction(name=name).reference_column == column
    assert RewardFunction(name="json_schema", schema_file="s.json").reference_column is None
    assert RewardFunction(name="exact_answer", column="gold").reference_column == "gold"
