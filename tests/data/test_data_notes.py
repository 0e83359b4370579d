"""What a data report says about the loss mask and repeated rows, in a sentence each."""

import pytest

from lorakit.data.data_notes import data_notes
from lorakit.recipe.schema import Recipe

REPORT = {
    "rows_read": 280, "examples_train": 240, "examples_val": 40, "tokens_train": 9000,
    "trained_tokens_train": 4000, "sources": [{"format": "text"}], "faults": [],
}  # fmt: skip


def notes(train_on="responses", **values):
    return data_notes({**REPORT, **values}, Recipe(model="m", data="d", train_on=train_on))


def fault(kind, count, action="kept"):
    return {"kind": kind, "count": count, "first_rows": ["a:1"], "action": action}


def test_good_data_has_no_notes():
    assert notes() == notes(train_on="all") == []


@pytest.mark.parametrize(
    ("train_on", "trained", "words"),
    [
        ("all", 9000, "Set train_on: responses"),
        ("responses", 9000, "100% of the tokens are trained. The rows were read as text"),
        ("responses", 100, "only 1.1% of the tokens are trained"),
    ],
)
def test_a_mask_with_nearly_all_or_hardly_any_tokens(train_on, trained, words):
    (note,) = notes(train_on, trained_tokens_train=trained)
    assert words in note


def test_prompts_to_sample_from_have_no_mask_to_judge():
    recipe = Recipe(model="m", data="d", objective="grpo", reward_funcs=["numeric_answer"])
    assert data_notes({**REPORT, "trained_tokens_train": 0}, recipe) == []


def test_repeated_rows_count_from_a_tenth_on():
    assert notes(faults=[fault("exact duplicate", 3)]) == []
    (note,) = notes(faults=[fault("exact duplicate", 180), fault("near duplicate", 30)])
    assert note.startswith("Duplicated data: 75% of the rows (210) repeat another row")
    overlap = "held-out row is also in the training data"
    (note,) = notes(faults=[fault(overlap, 30)])
    assert note.startswith("Held-out rows are trained on: 75% of them (30)")


def test_other_faults_of_many_rows_are_named():
    (note,) = notes(faults=[fault("no answer", 60, "left out"), fault("odd", 2, "left out")])
    assert note == "21% of the rows: no answer: left out."


def test_the_kinds_are_those_that_are_reported():
    import numpy as np

    from lorakit.data.dedup import report_duplicates, report_overlap, sign
    from lorakit.data.issues import IssueLog

    texts = ["a text that is long enough to be signed, and repeated"] * 2
    marks, log = np.array([1, 1], np.uint64), IssueLog()
    side = marks, sign(texts)
    report_duplicates(*side, lambda i: f"a:{i}", log)
    report_overlap(side, side, lambda i: f"a:{i}", log)
    found = [fault(each.kind, 100) for each in log.faults()]
    assert [note[:15] for note in notes(faults=found)] == ["Duplicated data", "Held-out rows a"]
