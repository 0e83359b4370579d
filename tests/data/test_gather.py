"""Sources become one shelf: every row kept or counted, found again while nothing changed."""

import json

import pytest

from lorakit.data import gather as module
from lorakit.data.gather import gather
from lorakit.recipe import Recipe

ROWS = [{"question": f"What is {i}?", "answer": str(i)} for i in range(5)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"question": "only"}]))
    return path


def load(path, **values):
    return gather([str(path)], Recipe(model="demo", data=str(path), **values), [])


def test_rows_in_are_rows_kept_and_rows_reported(source):
    shelf, log = load(source)
    line = shelf.meta["lines"][0]
    assert (line["rows"], line["left_out"], line["format"]) == (6, 1, "question/answer")
    assert line["rows"] == len(shelf) + log.rows_left_out
    assert [c.messages[1].content for c in shelf] == ["0", "1", "2", "3", "4"]


def test_a_second_run_reads_no_row_until_a_byte_or_a_rule_changes(source, monkeypatch):
    first = load(source)[0]
    read = []
    real = module.read_rows
    monkeypatch.setattr(module, "read_rows", lambda *a, **k: read.append(a) or real(*a, **k))
    again, log = load(source)
    assert (list(again), read) == (list(first), [])
    assert log.faults()[0].kind == "no answer"
    load(source, system="Be brief.")
    assert len(read) == 1
    source.write_text(source.read_text().replace("What", "Who"))
    assert load(source)[0][0].messages[0].content == "Who is 0?"
    assert len(read) == 2
