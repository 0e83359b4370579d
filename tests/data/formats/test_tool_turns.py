"""Tool turns of any tool come into one form."""

import json

import pytest

from lorakit.data.issues import RowError

from .made_rows import ASK, CALL, END, convert, turns


def with_calls(*ids, results):
    calls = [{"id": i, **CALL} for i in ids]
    answers = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in results]
    return {"messages": [ASK, {"role": "assistant", "tool_calls": calls}, *answers, END]}


def test_results_come_in_the_order_of_their_calls():
    item = convert(with_calls("a", "b", "c", results="cab"))
    assert [m.content for m in item.messages if m.role == "tool"] == ["of a", "of b", "of c"]


@pytest.mark.parametrize(
    ("results", "message"),
    [("b", "call 'a' in turn 2 has no result"), ("abx", "is the result of 'x'")],
)
def test_results_that_do_not_fit_their_calls_are_named(results, message):
    with pytest.raises(RowError, match=message):
        convert(with_calls("a", "b", results=results))


def test_calls_in_a_row_are_one_turn():
    call = json.dumps({"name": "tide", "arguments": {"at": "noon"}})
    rows = [
        ("tool_call", call),
        ("tool_call", call),
        ("tool_response", "1"),
        ("tool_response", "2"),
    ]
    middle = [{"role": role, "content": content} for role, content in rows]
    item = convert({"messages": [ASK, *middle, END]})
    assert [m.role for m in item.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert len(item.messages[1].extra["tool_calls"]) == 2


def test_wrapped_results_lose_the_marks_that_templates_write():
    wrapped = "<tool_response>\n12\n</tool_response>\n<tool_response>\n13\n</tool_response>"
    call = {"role": "assistant", "tool_calls": [CALL, CALL]}
    item = convert({"messages": [ASK, call, {"role": "tool", "content": wrapped}, END]})
    assert turns(item)[2:4] == [("tool", "12"), ("tool", "13")]
    prose = "It writes <tool_response>12</tool_response> and goes on"
    item = convert({"messages": [ASK, call, {"role": "tool", "content": prose}, END]})
    assert turns(item)[2] == ("tool", prose)


def test_nulls_of_arrow_are_no_arguments_and_no_schema():
    filled = {"function": {"name": "tide", "arguments": {"at": "noon", "o": {"x": 1, "y": None}}}}
    text = {"function": {"name": "tide", "arguments": '{"at": null}'}}
    properties = {"at": {"type": "string", "enum": ["noon", None]}, "speed": None}
    schema = {"name": "tide", "parameters": {"type": "object", "properties": properties}}
    item = convert(
        {
            "messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [filled, text]}],
            "tools": [{"type": "function", "function": schema}],
        }
    )
    calls = [c["function"]["arguments"] for c in item.messages[1].extra["tool_calls"]]
    assert calls == [{"at": "noon", "o": {"x": 1}}, {"at": None}]
    kept = item.tools[0]["function"]["parameters"]["properties"]
    assert kept == {"at": {"type": "string", "enum": ["noon", None]}}
