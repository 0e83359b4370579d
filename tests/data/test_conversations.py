"""Sources become one shelf: every row kept or counted, found again while nothing changed."""

import json

import pytest

from lorakit.data import conversations
from lorakit.data.conversations import read_conversations
from lorakit.recipe.schema import Recipe

ROWS = [{"question": f"What is {i}?", "answer": str(i)} for i in range(5)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"question": "only"}]))
    return path


def load(path, **values):
    return read_conversations([str(path)], Recipe(model="demo", data=str(path), **values), [])


def test_rows_in_are_rows_kept_and_rows_reported(source):
    shelf, log = load(source)
    line = shelf.meta["lines"][0]
    assert (line["rows"], line["left_out"], line["format"]) == (6, 1, "question/answer")
    assert line["rows"] == len(shelf) + log.rows_left_out
    assert [c.messages[1].content for c in shelf] == ["0", "1", "2", "3", "4"]


def test_a_second_run_reads_no_row_until_a_byte_or_a_rule_changes(source, monkeypatch):
    first = load(source)[0]
    read = []
    real = conversations.read_rows
    monkeypatch.setattr(conversations, "read_rows", lambda *a, **k: read.append(a) or real(*a, **k))
    again, log = load(source)
    assert (list(again), read) == (list(first), [])
    assert log.faults()[0].kind == "no answer"
    load(source, system="Be brief.")
    assert len(read) == 1
    swapped = load(source, columns={"question": "answer", "answer": "question"})[0]
    assert (len(read), swapped[0].messages[0].content) == (2, "0")
    source.write_text(source.read_text().replace("What", "Who"))
    assert load(source)[0][0].messages[0].content == "Who is 0?"
    assert len(read) == 3


def test_each_source_has_its_own_numbers(source, tmp_path):
    other = tmp_path / "others.jsonl"
    other.write_text(json.dumps({"instruction": "Do.", "output": "Done."}) + "\n")
    third = tmp_path / "third.jsonl"
    third.write_text(source.read_text() + json.dumps({"question": "too"}) + "\n")
    names = [str(path) for path in (source, other, third)]
    shelf, log = read_conversations(names, Recipe(model="demo", data=names), [])
    assert [(x["source"], x["format"], x["rows"], x["left_out"]) for x in shelf.meta["lines"]] == [
        ("rows.jsonl", "question/answer", 6, 1),
        ("others.jsonl", "alpaca", 1, 0),
        ("third.jsonl", "question/answer", 7, 2),
    ]
    assert shelf.column("source_index").tolist() == [0] * 5 + [1] + [2] * 5
    assert log.rows_left_out == 3


def test_a_file_that_is_not_read_is_told_as_soon_as_it_is_there(tmp_path):
    """The rows are the same: nothing of them tells that there is more in the folder now."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert load(tmp_path)[1].faults() == ()
    (tmp_path / "more.pdf").write_text("x")
    (fault,) = load(tmp_path)[1].faults()
    assert (fault.kind, fault.count, fault.action) == ("file of another kind", 1, "not read")


def test_a_null_argument_of_a_call_is_left_out_and_reported(tmp_path):
    """Arrow fills such nulls in; in JSON text a null is the author's own."""
    calls = [
        {"function": {"name": "f", "arguments": {"a": 1, "b": {"c": None}}}},
        {"function": {"name": "f", "arguments": {"a": 1}}},
        {"function": {"name": "f", "arguments": '{"a": null}'}},
    ]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
        }
        for call in calls
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, log = read_conversations([str(path)], Recipe(model="m", data=[str(path)]), ())
    found = [i.messages[1].extra["tool_calls"][0]["function"]["arguments"] for i in items]
    assert found == [{"a": 1, "b": {}}, {"a": 1}, {"a": None}]
    assert [(f.kind, f.count, f.action) for f in log.faults()] == [
        ("null argument of a tool call", 1, "the row kept without it")
    ]
    assert log.rows_left_out == sum(f.count for f in log.faults() if f.action == "left out") == 0
