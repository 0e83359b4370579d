"""Faults are counted with their first rows; order of turns is enforced; nothing goes silently."""

import json

import pytest

from lorakit.data.issues import (
    FatalRowError,
    IssueLog,
    RowError,
    check_turns,
    content_hash,
    refuse_if_empty,
    refuse_if_strict,
)
from lorakit.errors import DataError
from lorakit.types import Conversation, Document, Message, Origin

AT = Origin("rows.jsonl", 3)
LETTERS = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


def turns(letters):
    """One turn a letter; c is an assistant turn that calls a tool."""
    made = [Message(LETTERS[x], f"{x}{i}", CALL if x == "c" else {}) for i, x in enumerate(letters)]
    return Conversation(tuple(made), AT)


@pytest.mark.parametrize(
    "letters", ["ua", "sua", "uaua", "suaua", "ucta", "ucttctaua", "uc", "uauc"]
)
def test_orderly_turns_pass_unchanged(letters):
    log = IssueLog()
    assert check_turns(turns(letters), log) == turns(letters)
    assert log.faults() == ()


@pytest.mark.parametrize(
    ("letters", "kind"),
    [
        ("u", "no answer"),
        ("su", "no answer"),
        ("au", "roles out of order"),
        ("sau", "roles out of order"),
        ("uua", "two user turns in a row"),
        ("uaa", "two assistant turns in a row"),
        ("usa", "system turn that is not the first"),
        ("ssua", "system turn that is not the first"),
        ("uca", "tool call without result"),
        ("ucua", "tool call without result"),
        ("uata", "tool result without call"),
        ("uta", "tool result without call"),
        ("tua", "tool result without call"),
        ("uctua", "roles out of order"),
    ],
)
def test_disorder_is_a_fault_of_the_row(letters, kind):
    with pytest.raises(RowError, match=r"rows.jsonl:3") as caught:
        check_turns(turns(letters), IssueLog())
    assert caught.value.kind == kind


def test_a_last_question_without_answer_is_taken_off_and_reported():
    log = IssueLog()
    assert check_turns(turns("uau"), log) == turns("ua")
    assert [(f.kind, f.first_rows) for f in log.faults()] == [
        ("last question without answer", ("rows.jsonl:3",))
    ]


def test_a_last_tool_result_without_answer_is_taken_off_and_reported():
    log = IssueLog()
    assert check_turns(turns("uauctt"), log) == turns("uauc")
    assert [f.kind for f in log.faults()] == ["last tool result without answer"]


def test_results_may_follow_calls_that_are_written_as_text():
    said = (
        Message("user", "a"),
        Message("assistant", '<tool_call>{"name": "f"}</tool_call>'),
        Message("tool", "1"),
        Message("assistant", "b"),
    )
    item = Conversation(said, AT)
    assert check_turns(item, IssueLog()) == item


def test_a_fault_that_spoils_a_run_is_marked():
    log, other = IssueLog(), IssueLog()
    log.leave_out(RowError("no answer", AT, "x"))
    other.leave_out(FatalRowError("two BOS tokens", AT, "x"))
    log.absorb(other)
    assert {f.kind: f.spoils for f in log.faults()} == {"no answer": False, "two BOS tokens": True}


def test_what_a_log_absorbs_takes_nothing_from_its_own():
    """Own faults first, whichever of the two would spoil a run."""
    spoiled = FatalRowError("two BOS tokens", Origin("a.jsonl", 1), "x")
    plain = RowError("no answer", Origin("b.jsonl", 1), "x")
    for first, second in ((spoiled, plain), (plain, spoiled)):
        log, other = IssueLog(), IssueLog()
        log.leave_out(first)
        other.leave_out(second)
        log.absorb(other)
        assert log.spoils
        assert {f.kind: f.spoils for f in log.faults()} == {
            "no answer": False,
            "two BOS tokens": True,
        }
        assert log.first_left_out is first
        assert log.rows_left_out == 2
        empty = IssueLog()
        empty.absorb(log)
        assert empty.first_left_out is first


def test_the_commonest_fault_comes_first_and_a_row_is_named_once():
    log = IssueLog()
    log.add("control characters", AT, "taken out")
    for row in (3, 3, 4):
        log.add("special token written in a turn", Origin("rows.jsonl", row), "kept as plain text")
    log.add("control characters", Origin("rows.jsonl", 9), "taken out")
    assert [(f.kind, f.count, f.first_rows) for f in log.faults()] == [
        ("special token written in a turn", 3, ("rows.jsonl:3", "rows.jsonl:4")),
        ("control characters", 2, ("rows.jsonl:3", "rows.jsonl:9")),
    ]


def test_the_log_counts_all_and_shows_the_first_rows():
    log, other = IssueLog(), IssueLog()
    for row in range(1, 9):
        log.leave_out(RowError("no answer", Origin("a.jsonl", row), "x"))
    other.leave_out(RowError("no answer", Origin("b.jsonl", 1), "x"))
    log.absorb(other)
    (fault,) = log.faults()
    assert (fault.count, fault.action, log.rows_left_out) == (9, "left out", 9)
    assert fault.first_rows == tuple(f"a.jsonl:{row}" for row in range(1, 6))


def test_equal_content_has_one_fingerprint_and_borders_count():
    one = Conversation((Message("user", "ab"), Message("assistant", "c")), Origin("x", 1))
    two = Conversation((Message("user", "ab"), Message("assistant", "c")), Origin("y", 2))
    other = Conversation((Message("user", "a"), Message("assistant", "bc")), Origin("x", 1))
    assert content_hash(one) == content_hash(two) != content_hash(other)
    called = Conversation((Message("user", "ab"), Message("assistant", "c", CALL)), AT)
    assert content_hash(called) != content_hash(one)
    assert content_hash(Document("ab", AT)) != content_hash(Document("ba", AT))
    roles = Conversation((Message("system", "ab"), Message("assistant", "c")), AT)
    assert content_hash(roles) != content_hash(one)
    longer = Conversation((*one.messages, *one.messages), AT)
    assert content_hash(longer) != content_hash(one)


def test_a_log_survives_the_way_through_json():
    log = IssueLog()
    log.add("near duplicate", AT, "kept")
    log.add_many("exact duplicate", 9, [f"a:{i}" for i in range(9)], "kept")
    log.leave_out(FatalRowError("two BOS tokens", AT, "it begins with two"))
    again = IssueLog.from_dict(json.loads(json.dumps(log.as_dict())))
    assert again.faults() == log.faults()
    assert (again.rows_left_out, again.spoils) == (1, True)


def test_strict_names_every_fault_but_not_what_was_asked_for():
    log = IssueLog()
    log.add("weight 0.5", AT, "not drawn")
    refuse_if_strict(log)
    log.add("near duplicate", AT, "kept")
    log.leave_out(RowError("no answer", AT, "column answer is null"))
    with pytest.raises(DataError, match=r"1 x near duplicate \(rows.jsonl:3\)\n.*1 x no answer"):
        refuse_if_strict(log)


def test_nothing_left_stops_with_the_commonest_reasons():
    log = IssueLog()
    log.leave_out(RowError("no answer", AT, "column answer is null"))
    with pytest.raises(DataError, match=r"none of its 1 rows .*1 x no answer \(rows.jsonl:3\)"):
        refuse_if_empty(0, 1, "rows.jsonl", log)
    refuse_if_empty(1, 2, "rows.jsonl", log)
    with pytest.raises(DataError, match=r"rows.jsonl: there are no rows in it"):
        refuse_if_empty(0, 0, "rows.jsonl", IssueLog())


def test_a_row_that_spoils_the_run_is_what_is_said_where_it_came_first():
    log = IssueLog()
    spoiled = FatalRowError("no end of turn", AT, "the model would not learn to stop")
    log.leave_out(spoiled)
    log.leave_out(RowError("no answer", AT, "column answer is null"))
    with pytest.raises(FatalRowError) as caught:
        refuse_if_empty(0, 2, "rows.jsonl", log)
    assert caught.value is spoiled
