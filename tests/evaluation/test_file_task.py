"""A file's rows are asked and scored; rows that cannot be are named, and the rest goes on."""

import json

import pytest
from tests.made_runs import answer

from lorakit.errors import DataError
from lorakit.evaluation.answer_metrics import parse_metric
from lorakit.evaluation.file_task import FileTask
from lorakit.evaluation.model_side import ModelSide
from lorakit.model.load import load_run
from lorakit.recipe.schema import Recipe


@pytest.fixture
def write(tmp_path):
    def make(rows, name="mine.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def test_each_answer_is_scored_by_each_metric(speaker, write):
    loaded = load_run(speaker("fruit"))
    right = answer("fruit", 3, 4)
    rows = [
        {"prompt": "Box 3?", "completion": right},
        {"prompt": "Box 4?", "completion": "no digit"},
        {"prompt": "Box 5?", "completion": "7"},
    ]
    notes = []
    metrics = [parse_metric(name) for name in ("exact_match", "contains", "numeric")]
    path = write(rows)
    task = FileTask(path, metrics, loaded.recipe, max_new_tokens=4, note=notes.append)
    assert task.name == "mine"
    exact, contains, numeric = task.run(ModelSide(loaded.model, loaded.tokenizer))
    assert list(exact.values.values()) == [1.0, 0.0, 0.0]
    assert list(contains.values.values()) == [1.0, 0.0, 0.0]
    # The talker names no digit, and two references have none.
    assert list(numeric.values) == ["mine.jsonl:3"]
    assert set(numeric.failures.values()) == {"the reference has no number"}
    assert task.metric_directions() == {"exact_match": True, "contains": True, "numeric": True}


def test_the_limit_and_the_columns_of_the_recipe(write):
    rows = [{"my_q": f"Box {i}?", "my_a": str(i)} for i in range(9)]
    columns = {"instruction": "my_q", "response": "my_a"}
    recipe = Recipe(model="m", data="d", columns=columns)
    metrics = [parse_metric("numeric")]
    task = FileTask(write(rows), metrics, recipe, limit=4, note=print)
    assert [row.messages[0].content for row in task.rows] == [f"Box {i}?" for i in range(4)]
    # Another file need not have them.
    rows = [{"prompt": "a?", "completion": "b"}] * 2
    task = FileTask(write(rows, "other.jsonl"), metrics, recipe, note=print)
    assert len(set(task.keys)) == len(task.rows)


def test_a_file_without_answers_is_refused(write):
    with pytest.raises(DataError, match=r"no row ends with an answer"):
        FileTask(write([{"text": "a story"}]), [], Recipe(model="m", data="d"), note=print)
