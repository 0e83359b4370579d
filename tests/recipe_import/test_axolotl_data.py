"""Axolotl's data sets: paths, splits, columns, and what their type would add."""

from pathlib import Path

import pytest

from lorakit.recipe_import.axolotl_data import datasets, held_out_data, template, texts
from lorakit.recipe_import.rules import Draft, Unfit


def read(*entries, function=datasets):
    draft = Draft({}, Path())
    said = function(list(entries), draft)
    return said.values, {key: found.status for key, found in draft.lines}


def test_paths_files_configurations_and_splits():
    values, _ = read(
        {"path": "a/b", "type": "chat_template"},
        {"path": "a/c", "name": "old", "split": "test", "type": "chat_template"},
        {"path": "json", "data_files": ["x.jsonl", "y.jsonl"], "type": "chat_template"},
    )
    assert values == {"data": ["a/b", "a/c:old:test", "x.jsonl", "y.jsonl"]}
    values, lines = read({"path": "a/b", "data_files": "x.json", "type": "chat_template"})
    assert values == {"data": "a/b"}
    assert lines["datasets[0].data_files"] == "left"


@pytest.mark.parametrize(
    ("kind", "status"),
    [("chat_template", "own"), ("sharegpt", "own"), ("alpaca", "left"), ("completion", "taken"),
     ("alpaca_w_system.load", "left"), ("input_output", "left")],
)  # fmt: skip
def test_types(kind, status):
    values, lines = read({"path": "d", "type": kind})
    assert lines["datasets[0].type"] == status
    assert values == {"data": "d"}


def test_columns_are_named_where_they_are_unusual():
    own = {"field_instruction": "front", "field_output": "back", "field_input": ""}
    values, lines = read({"path": "d", "type": own})
    assert values["columns"] == {"instruction": "front", "response": "back"}
    assert lines == {}
    values, _ = read({"path": "d", "type": "chat_template", "field_messages": "talk"})
    assert values["columns"] == {"messages": "talk"}
    values, lines = read({"path": "d", "type": own}, {"path": "e", "type": "chat_template"})
    assert "columns" not in values
    assert lines["columns"] == "left"


@pytest.mark.parametrize(
    "extra",
    [{"message_property_mappings": {"role": "who", "content": "says"}}, {"train_on_eos": "last"},
     {"roles_to_train": ["assistant", "user"]}, {"message_field_training": "learn"},
     {"chat_template": "chatml"}, {"shards": 4}],
)  # fmt: skip
def test_what_changes_the_mask_or_the_rows_is_said(extra):
    _, lines = read({"path": "d", "type": "chat_template", **extra})
    assert "left" in lines.values()


def test_templates_texts_and_held_out_rows():
    assert template("tokenizer_default", Draft({}, Path())).status == "own"
    assert template("llama3", Draft({}, Path())).status == "left"
    values, _ = read({"path": "d", "text_column": "body"}, function=texts)
    assert values == {"data": "d", "documents": "completion", "columns": {"text": "body"}}
    values, _ = read({"path": "h.jsonl", "split": "train"}, function=held_out_data)
    assert values == {"val_data": "h.jsonl"}
    with pytest.raises(Unfit):
        read({"path": "a"}, {"path": "b"}, function=held_out_data)
    with pytest.raises(Unfit):
        read({"type": "alpaca"})
