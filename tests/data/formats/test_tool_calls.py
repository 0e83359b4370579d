"""Tool calls and schemas of every spelling become the one form that chat templates take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.formats.messages import parse_tool_calls, parse_tools
from lorakit.data.issues import RowError
from lorakit.types import Origin

PLAIN = {"name": "find", "arguments": {"city": "Rome"}}
CALL = {"type": "function", "function": PLAIN}
SCHEMA = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}


def fault(kind, detail):
    return RowError(kind, Origin("rows.jsonl", 4), detail)


@pytest.mark.parametrize(
    "value",
    [
        CALL,
        [CALL],
        PLAIN,
        [PLAIN],
        {"name": "find", "arguments": '{"city": "Rome"}'},
        '{"name": "find", "arguments": {"city": "Rome"}}',
        '[{"name": "find", "arguments": "{\\"city\\": \\"Rome\\"}"}]',
        {"name": "find", "parameters": {"city": "Rome"}},
    ],
)
def test_every_spelling_of_a_call_gives_one_form(value):
    assert parse_tool_calls(value, "messages[1]", fault) == [CALL]


def test_ids_and_several_calls_are_kept_in_order():
    calls = parse_tool_calls([{**CALL, "id": "a"}, {"name": "now"}], "messages[1]", fault)
    assert [c.get("id") for c in calls] == ["a", None]
    assert calls[1]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{broken", "not JSON"),
        ([], "empty list"),
        ({"arguments": {}}, "expected {"),
        ({"name": 3}, "expected {"),
        ({"name": "f", "arguments": "[1]"}, "expected an object of arguments"),
        (
            {"name": "f", "arguments": "{broken"},
            r"\[0\].arguments is '{broken': not JSON",
        ),
        (
            {"name": "f", "arguments": '{"q": 1, "q": 2}'},
            r'\[0\].arguments: the key "q" has two values: 1 and 2',
        ),
        (7, "expected {"),
    ],
)
def test_a_broken_call_names_its_place(value, message):
    with pytest.raises(RowError, match=rf"rows.jsonl:4: messages\[1\].*{message}"):
        parse_tool_calls(value, "messages[1]", fault)


@pytest.mark.parametrize(
    "value",
    [
        [SCHEMA],
        SCHEMA,
        [{"type": "function", "function": SCHEMA}],
        '[{"name": "find"}]',
        ['{"name": "find"}'],
        ['{"type": "function", "function": {"name": "find"}}'],
    ],
)
def test_schemas_are_wrapped_alike(value):
    (tool,) = parse_tools(value, fault)
    assert tool["type"] == "function"
    assert tool["function"]["name"] == "find"


def test_no_tools_and_broken_ones():
    for nothing in (None, "", [], "[]"):
        assert parse_tools(nothing, fault) == ()
    twice = '[{"name": "find", "name": "seek"}]'
    for value in ("{", [3], [{"description": "x"}], {"function": 3}, twice):
        with pytest.raises(RowError, match=r"rows.jsonl:4"):
            parse_tools(value, fault)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "function", "arguments", "id"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_calls_or_a_row_fault(value):
    for read in (lambda: parse_tool_calls(value, "x", fault), lambda: parse_tools(value, fault)):
        try:
            made = read()
        except RowError:
            continue
        assert all(isinstance(one["function"]["name"], str) for one in made)
