"""Unused columns are reported, and one that judges the answers stops the run."""

import json

import pytest

from lorakit.data.formats.columns import ColumnWatch
from lorakit.data.prepare import prepare_data
from lorakit.display.inspection_view import source_line
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import Origin, Row

PAIRS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(1, 9)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in PAIRS
]


def prepared(smollm, folder, rows, **values):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": "demo", "data": str(path), "val_size": 0, **values}
    return prepare_data(Recipe.model_validate(recipe), smollm)


def with_column(rows, name, values):
    return [{**row, name: values[i % len(values)]} for i, row in enumerate(rows)]


def test_unused_columns_are_in_the_report_and_on_the_screen(smollm, tmp_path):
    rows = [{**row, "id": i, "source": "web"} for i, row in enumerate(PAIRS)]
    (source,) = prepared(smollm, tmp_path, rows).report.sources
    assert source["columns_not_used"] == ["id", "source"]
    assert source_line(source).endswith(", columns not used: id, source")


def test_a_source_whose_columns_are_all_used_says_nothing_of_them(smollm, tmp_path):
    (source,) = prepared(smollm, tmp_path, PAIRS).report.sources
    assert source["columns_not_used"] == []
    assert "not used" not in source_line(source)


def test_a_column_that_comes_up_late_is_reported_too(smollm, tmp_path):
    rows = [{"prompt": f"Q {i}?", "completion": f"A {i}."} for i in range(150)]
    rows[-1]["origin"] = "forum"
    (source,) = prepared(smollm, tmp_path, rows).report.sources
    assert source["columns_not_used"] == ["origin"]


def test_a_long_list_of_columns_is_cut_on_the_screen_alone():
    source = {"source": "a.csv", "rows": 2, "format": "text", "reason": "", "left_out": 0}
    line = source_line({**source, "columns_not_used": [f"c{i}" for i in range(20)]})
    assert line.endswith("c10, c11, and 8 more")


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["pairs", "messages"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("label", [True, False]),
        ("label", ["good", "bad"]),
        ("kto_label", [1, 0]),
        ("score", [0.5, 4.0, 4.0]),
        ("overallRating", ["5", "4"]),
        ("up_votes", [10, 3]),
        ("reward", [0.1, -0.1]),
    ],
)
def test_a_column_that_judges_answers_stops_the_run(smollm, tmp_path, rows, name, values):
    with pytest.raises(DataError, match=f"column '{name}' judges the answers") as caught:
        prepared(smollm, tmp_path, with_column(rows, name, values))
    assert "rows.jsonl:1 has" in caught.value.message
    assert "rows.jsonl:2 has" in caught.value.message


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["pairs", "messages"])
def test_the_way_out_in_the_hint_works(smollm, tmp_path, rows):
    voted = with_column(rows, "label", [True, False])
    with pytest.raises(DataError) as caught:
        prepared(smollm, tmp_path, voted)
    from lorakit.recipe.safe_yaml import read_yaml

    text = caught.value.hint.partition("columns: ")[2].partition(" (or")[0]
    made = prepared(smollm, tmp_path, voted, columns=read_yaml(text))
    assert made.report.sources[0]["columns_not_used"] == ["label"]
    assert made.report.examples_train == 8


def test_a_judgment_that_never_differs_is_only_reported(smollm, tmp_path):
    made = prepared(smollm, tmp_path, with_column(PAIRS, "label", [True]))
    assert made.report.sources[0]["columns_not_used"] == ["label"]


def test_a_judgment_that_differs_after_hundreds_of_rows_is_found():
    watch = ColumnWatch(("prompt", "completion"), {}, None)
    for i in range(1, 1000):
        watch.check(Row({"prompt": "a", "completion": "b", "label": True}, Origin("f", i)))
    with pytest.raises(DataError, match="f:1 has True, f:1000 has False"):
        watch.check(Row({"prompt": "a", "completion": "b", "label": False}, Origin("f", 1000)))


@pytest.mark.parametrize("name", ["labeled_by", "scorer", "topic", "id", "collaborate"])
def test_other_columns_do_not_stop_a_run(smollm, tmp_path, name):
    made = prepared(smollm, tmp_path, with_column(PAIRS, name, ["x", "y"]))
    assert made.report.sources[0]["columns_not_used"] == [name]


def test_a_text_in_a_judging_column_is_no_judgment(smollm, tmp_path):
    texts = [f"The answer number {i} could have named its sources more clearly." for i in range(8)]
    made = prepared(smollm, tmp_path, with_column(PAIRS, "feedback", texts))
    assert made.report.sources[0]["columns_not_used"] == ["feedback"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "chosen": "Good.", "rejected": "Bad."},
        {"question": "Q?", "chosen": "Good.", "rejected": "Bad."},
        {
            "prompt": [{"role": "user", "content": "Q?"}],
            "chosen": [{"role": "assistant", "content": "Good."}],
            "rejected": [{"role": "assistant", "content": "Bad."}],
        },
        {
            "prompt": "Q?",
            "chosen": [
                {"role": "user", "content": "Q?"},
                {"role": "assistant", "content": "Good."},
            ],
            "rejected": [
                {"role": "user", "content": "Q?"},
                {"role": "assistant", "content": "Bad."},
            ],
        },
    ],
    ids=["texts", "question", "trl turns", "whole chats"],
)
def test_the_hint_for_preference_data_works_on_that_data(smollm, tmp_path, row):
    from lorakit.recipe.safe_yaml import read_yaml

    with pytest.raises(DataError, match="preference data") as caught:
        prepared(smollm, tmp_path, [row])
    made = prepared(
        smollm, tmp_path, [row], columns=read_yaml(caught.value.hint.partition("columns: ")[2])
    )
    text = smollm.decode([i for i in made.train[0].labels if i >= 0])
    assert "Good." in text
    assert "Bad." not in smollm.decode(made.train[0].input_ids)


def test_pairs_without_a_question_get_no_columns_that_cannot_work(smollm, tmp_path):
    row = {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    with pytest.raises(DataError, match="preference data") as caught:
        prepared(smollm, tmp_path, [row])
    assert "columns:" not in caught.value.hint


def test_a_rejected_answer_beside_the_usual_columns_stops_the_run(smollm, tmp_path):
    rows = with_column(PAIRS, "rejected", ["No."])
    with pytest.raises(DataError, match="preference data"):
        prepared(smollm, tmp_path, rows)
