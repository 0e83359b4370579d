"""Prompts and their columns from the forms that reward data has."""

import pytest

from lorakit.data.formats.prompts import FIELDS, check_references, guess_prompts, to_prompt
from lorakit.data.issues import RowError
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import Origin, Row

TURNS = [{"role": "user", "content": "Q"}]


def converted(values, columns=None, system=None):
    row = Row(values, Origin("rows.jsonl", 1))
    return to_prompt(row, guess_prompts([row], columns), system)


@pytest.mark.parametrize(
    ("values", "turns", "answer"),
    [
        ({"question": "Q", "answer": "A"}, ["Q"], "A"),
        ({"prompt": "Q", "solution": "A"}, ["Q"], "A"),
        ({"problem": "Q", "answer": 42}, ["Q"], "42"),
        ({"prompt": TURNS, "ground_truth": "A"}, ["Q"], "A"),
        ({"messages": TURNS, "answer": "A"}, ["Q"], "A"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "A"}]}, ["Q"], "A"),
        ({"conversations": [{"from": "human", "value": "Q"}], "answer": "A"}, ["Q"], "A"),
        ({"instruction": "I", "input": "Q", "output": "A"}, ["I\n\nQ"], "A"),
        ({"system": "S", "prompt": "Q"}, ["S", "Q"], ""),
        ({"input": "Q", "tests": ["assert x"]}, ["Q"], ""),
    ],
)
def test_forms(values, turns, answer):
    item = converted(values)
    assert [m.content for m in item.messages[:-1]] == turns
    assert item.messages[-1].role == "assistant"
    assert item.messages[-1].content == answer


def test_all_columns_go_to_the_functions():
    item = converted({"question": "Q", "solution": "A", "tests": ["x"], "level": 3})
    assert item.messages[-1].extra[FIELDS] == {
        "question": "Q", "solution": "A", "tests": ["x"], "level": 3, "answer": "A",
    }  # fmt: skip


def test_columns_can_be_named():
    item = converted({"text": "Q", "gold": "A"}, {"prompt": "text", "answer": "gold"}, "S")
    assert [m.content for m in item.messages] == ["S", "Q", "A"]


def test_data_without_prompts_is_refused_with_the_columns_that_it_has():
    with pytest.raises(DataError, match=r"no column holds a prompt \(columns: text, gold\)"):
        converted({"text": "Q", "gold": "A"})
    with pytest.raises(DataError, match="preference data"):
        converted({"prompt": "Q", "chosen": "A", "rejected": "B"})


@pytest.mark.parametrize("values", [{"question": "", "answer": "A"}, {"question": None}])
def test_an_empty_prompt_is_a_fault_of_its_row(values):
    row = Row(values, Origin("rows.jsonl", 7))
    with pytest.raises(RowError, match=r"rows\.jsonl:7"):
        to_prompt(row, guess_prompts([Row({"question": "Q"}, row.origin)]), None)


def test_a_prompt_ends_with_a_question():
    turns = [{"role": "system", "content": "S"}]
    with pytest.raises(RowError, match="ends with system, expected a user turn"):
        converted({"messages": turns})


def test_a_row_without_the_column_of_a_reward_is_left_out():
    recipe = Recipe.model_validate(
        {"model": "m", "data": "d", "objective": "grpo", "reward_funcs": ["unit_tests"]}
    )
    with pytest.raises(RowError, match="column tests is missing, and reward unit_tests reads it"):
        check_references(converted({"question": "Q"}), recipe)
    with pytest.raises(RowError, match=r"column tests is \[\]"):
        check_references(converted({"question": "Q", "tests": []}), recipe)
    item = converted({"question": "Q", "tests": "assert 1"})
    assert check_references(item, recipe) is item
