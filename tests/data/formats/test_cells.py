"""Columns and cells as other tools write them are read for what they mean."""

import pytest

from lorakit.data.formats.columns import ColumnWatch
from lorakit.errors import DataError
from lorakit.types import Origin, Row

from .made_rows import ASK, END, chat, convert, turns


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "systemPrompt"])
def test_a_system_text_in_a_column_leads_the_chat(name):
    item = convert({**chat({"content": "aye"}), name: "You are a pirate."})
    assert turns(item)[0] == ("system", "You are a pirate.")


@pytest.mark.parametrize(
    "name", ["thinking", "reasoning", "Complex_CoT", "reasoning_content", "rationale"]
)
def test_thoughts_in_a_column_are_the_thoughts_of_the_answer(name):
    item = convert({"question": "6x7?", name: "six times seven", "answer": "42"})
    assert item.messages[-1].extra == {"reasoning_content": "six times seven"}


def test_a_level_of_reasoning_is_no_thought():
    item = convert({"question": "6x7?", "reasoning": "high", "answer": "42"})
    assert item.messages[-1].extra == {}


def test_functions_of_the_old_openai_form_are_tools():
    schema = {"name": "tide", "parameters": {"type": "object", "properties": {}}}
    item = convert({"messages": [ASK, END], "functions": [schema]})
    assert item.tools == ({"type": "function", "function": schema},)


@pytest.mark.parametrize("value", [" ", "\n", "[]", "null", [], None, float("nan")], ids=repr)
def test_blank_tools_are_none(value):
    assert convert({"messages": [ASK, END], "tools": value}).tools == ()


def test_a_nan_of_pandas_is_an_empty_cell():
    row = {"instruction": "Add 1 and 2", "input": float("nan"), "output": "3"}
    assert turns(convert(row)) == [("user", "Add 1 and 2"), ("assistant", "3")]


@pytest.mark.parametrize("name", ["label", "is_good", "desirable", "approved"])
def test_rows_that_are_marked_as_bad_stop_even_if_all_are(name):
    row = Row({"prompt": "a", "completion": "b", name: False}, Origin("kto.jsonl", 1))
    with pytest.raises(DataError, match=f"column '{name}' judges the answers"):
        ColumnWatch(("prompt", "completion"), {}, None).check(row)
