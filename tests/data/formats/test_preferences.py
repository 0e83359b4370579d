"""Every common form of preference data gives the same pair, and faults are counted by row."""

import pytest

from lorakit.data.formats.preferences import guess_preferences, to_preferences
from lorakit.data.issues import IssueLog, RowError
from lorakit.errors import DataError
from lorakit.types import Message, Origin, Row

ASK = {"role": "user", "content": "Which?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("This one.", "None."))
HUMAN = "\n\nHuman: Which?\n\nAssistant: "


def rows_of(*values):
    return [Row(value, Origin("rows.jsonl", i + 1)) for i, value in enumerate(values)]


def convert(value, objective="dpo", columns=None, log=None, system=None):
    (row,) = rows_of(value)
    guess = guess_preferences([row], columns or {}, objective)
    return to_preferences(row, guess, system, objective, log or IssueLog())


FORMS = {
    "texts": {"prompt": "Which?", "chosen": "This one.", "rejected": "None."},
    "question": {"question": "Which?", "chosen": "This one.", "rejected": "None."},
    "alpaca": {"instruction": "Which?", "input": "", "chosen": "This one.", "rejected": "None."},
    "lists": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "text and lists": {"prompt": "Which?", "chosen": [GOOD], "rejected": [BAD]},
    "implicit": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "ultrafeedback": {
        "prompt": "Which?", "prompt_id": "a1", "chosen": [ASK, GOOD], "rejected": [ASK, BAD],
        "messages": [ASK, GOOD], "score_chosen": 8.5, "score_rejected": 3.0,
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Which?"}],
        "chosen": {"from": "gpt", "value": "This one."},
        "rejected": {"from": "gpt", "value": "None."},
    },
    "openai": {
        "input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD],
    },
    "hh-rlhf": {"chosen": HUMAN + "This one.", "rejected": HUMAN + "None."},
    "spoken prompt": {"prompt": HUMAN.strip(), "chosen": "This one.", "rejected": "None."},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_pair(form):
    (pair,) = convert(FORMS[form])
    assert pair.messages == (Message("user", "Which?"), Message("assistant", "This one."))
    assert pair.rejected == (Message("user", "Which?"), Message("assistant", "None."))
    assert pair.good is None


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_two_labeled_answers_for_kto(form):
    good, bad = convert(FORMS[form], "kto")
    assert (good.good, bad.good) == (True, False)
    assert good.messages[-1].content == "This one."
    assert bad.messages[-1].content == "None."
    assert good.rejected == bad.rejected == ()


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ({"prompt": "Which?", "completion": "This one.", "label": True}, True),
        ({"prompt": [ASK], "completion": [GOOD], "label": False}, False),
        ({"messages": [ASK, GOOD], "label": 1}, True),
        ({"instruction": "Which?", "output": "This one.", "kto_tag": "false"}, False),
        ({"question": "Which?", "answer": "This one.", "label": "good"}, True),
    ],
)
def test_answers_with_labels(value, good):
    (found,) = convert(value, "kto")
    assert found.messages == (Message("user", "Which?"), Message("assistant", "This one."))
    assert found.good is good


def test_earlier_answers_are_context_and_later_turns_are_compared():
    first = [ASK, {"role": "assistant", "content": "Why?"}, {"role": "user", "content": "So."}]
    (pair,) = convert({"chosen": [*first, GOOD], "rejected": [*first, BAD]})
    assert [m.train for m in pair.messages] == [True, False, True, True]
    assert [m.train for m in pair.rejected] == [True, False, True, True]
    (answer,) = convert({"messages": [*first, GOOD], "label": True}, "kto")
    assert [m.train for m in answer.messages] == [True, False, True, True]


def test_system_texts_and_named_columns():
    value = {"frage": "Which?", "system": "Be kind.", "gut": "This one.", "schlecht": "None."}
    for prompt in ("prompt", "instruction"):
        columns = {prompt: "frage", "chosen": "gut", "rejected": "schlecht"}
        (pair,) = convert(value, columns=columns, system="Unused.")
        assert pair.messages[0] == pair.rejected[0] == Message("system", "Be kind.")
        assert pair.messages[1] == Message("user", "Which?")
    (pair,) = convert(FORMS["lists"], system="From the recipe.")
    assert pair.messages[0] == pair.rejected[0] == Message("system", "From the recipe.")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"prompt": "Which?", "chosen": "Same.", "rejected": "Same."}, "identical answers"),
        ({"prompt": "Which?", "chosen": "", "rejected": "None."}, "no chosen"),
        ({"prompt": "Which?", "chosen": "A.", "rejected": None}, "no rejected"),
        ({"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "Other?"}, BAD]},
         "prompts differ"),
        ({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD, ASK]}, None),
        ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "prompts differ"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt"),
        ({"chosen": "A.", "rejected": "B."}, "no prompt"),
        ({"prompt": [ASK], "chosen": [{**GOOD, "content": " "}], "rejected": [BAD]},
         "empty assistant turn"),
        ({"image": "x.png", "prompt": "Which?", "chosen": "A.", "rejected": "B."}, "not text"),
    ],
)  # fmt: skip
def test_faults_name_their_kind(value, kind):
    if kind is None:
        assert convert(value)
        return
    with pytest.raises(RowError) as caught:
        convert(value)
    assert caught.value.kind == kind
    assert "rows.jsonl:1" in caught.value.message


@pytest.mark.parametrize("label", [None, "perhaps", 0.5, [True]])
def test_a_label_that_says_nothing_is_a_fault(label):
    with pytest.raises(RowError, match="expected true"):
        convert({"prompt": "Which?", "completion": "A.", "label": label}, "kto")


def test_scores_against_the_choice_are_counted():
    log = IssueLog()
    for chosen, rejected in ((1.0, 5.0), (4, 4), (5, 1)):
        convert({**FORMS["texts"], "score_chosen": chosen, "score_rejected": rejected}, log=log)
    kinds = {fault.kind: fault.count for fault in log.faults()}
    assert kinds == {"chosen answer with a lower score": 1, "chosen answer with an equal score": 1}


@pytest.mark.parametrize(
    ("value", "objective", "missing"),
    [
        ({"question": "A?", "answer": "B."}, "dpo", "chosen and rejected"),
        ({"prompt": "A?", "chosen": "B."}, "orpo", "column rejected"),
        ({"prompt": "A?", "completion": "B."}, "kto", "column label"),
    ],
)
def test_other_data_is_refused_by_the_missing_column(value, objective, missing):
    with pytest.raises(DataError) as caught:
        guess_preferences(rows_of(value), {}, objective)
    assert f"objective: {objective} needs the" in caught.value.message
    assert missing in caught.value.message
    assert "objective: sft" in caught.value.hint


def test_a_wrong_column_is_named():
    with pytest.raises(DataError, match="there is no column 'better'"):
        guess_preferences(rows_of(FORMS["texts"]), {"chosen": "better"}, "dpo")
