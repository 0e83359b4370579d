"""Marks of other tools leave an answer out here too."""

import json

import pytest

from lorakit.data.formats.marks import unknown_flags
from lorakit.data.issues import RowError

from .made_rows import ASK, END, chat, convert


@pytest.mark.parametrize(
    "mark",
    [
        {"train": False},
        {"training": False},
        {"trainable": False},
        {"loss": False},
        {"loss": 0.0},
        {"loss_mask": 0},
        {"loss_mask": "0"},  # text in LoongForge's data
        {"weight": 0},
        {"masked": True},
    ],
    ids=str,
)
def test_a_mark_of_another_tool_leaves_its_answer_out(mark):
    item = convert(chat({"content": "wrong", **mark}, {"content": "right"}))
    assert [m.train for m in item.messages if m.role == "assistant"] == [False, True]


def test_marks_that_contradict_each_other_name_themselves():
    with pytest.raises(RowError, match="weight and masked contradict"):
        convert(chat({"content": "a", "weight": 1, "masked": True}))


def test_a_schema_with_marks_on_all_turns_is_read():
    turn = {"role": "user", "content": "q", "loss_mask": 1, "masked": False}
    item = convert({"messages": [turn, {"role": "assistant", "content": "a", "loss_mask": 1}]})
    assert all(m.train for m in item.messages)


def test_flags_without_a_known_meaning_are_named():
    row = chat({"content": "a", "keep": False, "turn_id": 3, "name": "bob"}, {"content": "b"})
    assert list(unknown_flags(row)) == ["keep"]


@pytest.mark.parametrize("as_text", [False, True])
def test_answers_inside_a_prompt_are_context(as_text):
    prompt = [ASK, {"role": "assistant", "content": "low"}, {"role": "user", "content": "sure?"}]
    row = {"prompt": prompt, "completion": [END]}
    item = convert({k: json.dumps(v) for k, v in row.items()} if as_text else row)
    assert [(m.content, m.train) for m in item.messages if m.role == "assistant"] == [
        ("low", False),
        ("high", True),
    ]
