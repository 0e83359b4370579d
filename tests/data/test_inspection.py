"""Pieces say what each token is; figures agree with the report; a spoiling row is told, not met."""

import json

import pytest

from lorakit.data.inspection import inspect_prepared, runs, token_texts
from lorakit.data.prepare import prepare_data
from lorakit.data.tokenize.encode import encode
from lorakit.recipe.schema import Recipe
from lorakit.types import IGNORE

ROWS = [
    {"question": f"What is {i} + {i}?" + " Say it." * (i % 7), "answer": str(i)} for i in range(30)
]


def inspection(tokenizer, folder, rows=ROWS, count=3, **values):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate({"model": "demo", "data": str(path), **values})
    prepared = prepare_data(recipe, tokenizer, inspecting=True)
    return inspect_prepared(prepared, tokenizer, recipe, "some/model", count), prepared


@pytest.mark.parametrize("name", ["smollm2", "llama2", "llama3", "qwen3"])
def test_pieces_hold_every_token_once_and_read_as_the_text(family, chat, name):
    tokenizer = family(name)
    for example in encode(tokenizer, chat("Привет 🙂, naïve?", "日本語 🤷🏽‍♀️ ok", system="S")):
        parts = list(token_texts(tokenizer, example))
        assert [i for p in parts for i in p.ids] == example.input_ids
        assert sum(len(p.ids) for p in parts if p.trained) == example.trained_tokens
        text = "".join(p.text for p in parts)
        for said in ("Привет 🙂, naïve?", "日本語 🤷🏽‍♀️ ok"):
            assert said in text
        special = [p.text for p in parts if p.special]
        assert special
        assert all(text.startswith("<") for text in special)


def test_runs_join_neighbors_that_are_alike(smollm, chat):
    (example,) = encode(smollm, chat("a?", "one", "b?", "two"))
    found = [
        (on, "".join(p.text for p in run)) for on, run in runs(list(token_texts(smollm, example)))
    ]
    assert [text for on, text in found if on] == ["one<|im_end|>", "two<|im_end|>"]
    assert [on for on, _ in found] == [False, True, False, True]


def test_figures_agree_with_the_report(smollm, tmp_path):
    found, prepared = inspection(smollm, tmp_path, count=5)
    assert found.lengths.examples == found.report.examples_train + found.report.examples_val == 30
    assert found.lengths.longest == found.report.longest_example
    sizes = [len(e.input_ids) for e in prepared.train]
    by_why = {s.why: len(s.example.input_ids) for s in found.shown}
    assert by_why["longest"] == max(sizes)
    assert sorted(sizes)[len(sizes) // 2] == by_why["of median length"]
    assert len(found.shown) == 5
    assert not found.stopping


def test_the_json_form_says_what_is_trained(smollm, tmp_path):
    found, _ = inspection(smollm, tmp_path, count=1)
    value = json.loads(json.dumps(found.as_dict()))
    (example,) = value["examples"]
    assert example["row"].startswith("rows.jsonl:")
    assert example["trained"][0].endswith("<|im_end|>")
    assert example["trained"][0] in example["text"]
    assert len(example["input_ids"]) == len(example["labels"])
    assert example["labels"][0] == IGNORE
    assert value["spoils"] is False
    assert value["lengths"]["examples"] == 30


def test_a_row_that_spoils_a_run_is_told(smollm, tmp_path):
    rows = [*ROWS, {"question": "long " * 90, "answer": "x"}]
    found, _ = inspection(smollm, tmp_path, rows, cutoff_len=80, on_overlength="error")
    assert found.stopping
    assert found.as_dict()["spoils"] is True
    assert [f.first_rows for f in found.report.faults if f.spoils] == [("rows.jsonl:31",)]


def test_a_single_example_can_be_looked_at(smollm, tmp_path):
    found, _ = inspection(smollm, tmp_path, ROWS[:1], val_size=0)
    assert [s.why for s in found.shown] == ["first"]
