"""Unusable cells become faults that name row and column; usable spellings become turns."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.formats.messages import (
    RowFields,
    parse_messages,
    parse_tool_calls,
    parse_tools,
)
from lorakit.data.formats.row_formats import guess_format, to_conversation
from lorakit.data.issues import RowError
from lorakit.types import Conversation, Document, Origin, Row

NESTED = [[]]
for _ in range(5000):
    NESTED = [NESTED]


def convert(values):
    row = Row(values, Origin("rows.jsonl", 17))
    return to_conversation(row, guess_format([row]), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "a", "answer": None}, "column answer is null"),
        ({"question": "a", "answer": " \n"}, "column answer is empty"),
        ({"question": "", "answer": "b"}, "column question is empty"),
        ({"question": "a", "answer": 4}, "column answer holds 4, expected a text"),
        ({"question": ["a"], "answer": "b"}, "column question holds"),
        ({"question": "a", "answer": "\ud800"}, "half a surrogate"),
        ({"question": "a", "answer": NESTED}, "column answer holds"),
        ({"messages": None}, "column messages is null"),
        ({"messages": []}, "empty list"),
        ({"messages": "hello"}, "column messages is 'hello', expected a list of turns"),
        ({"messages": "[broken"}, "is not JSON"),
        (
            {"messages": '[{"role": "user", "content": "a", "content": "b"}]'},
            'column messages: the key "content" has two values: "a" and "b"',
        ),
        ({"messages": ["hello"]}, r"messages\[0\] is 'hello', expected an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] \(user\) has no content"),
        ({"messages": [{"role": "user", "content": " "}]}, r"messages\[0\] \(user\) is empty"),
        ({"messages": [{"role": "gpt", "content": "\n"}]}, r"\[0\] \(assistant\) is empty"),
        ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\] \(user\) is empty"),
        ({"messages": [{"role": None, "content": "a"}]}, r"messages\[0\] has the role null"),
        ({"messages": [{"role": "alien", "content": "a"}]}, "known: system"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, "is 0.5, expected true"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "only assistant turns can"),
        ({"messages": [{"role": "gpt", "content": "a", "weight": 2}]}, "weight is 2"),
        (
            {"messages": [{"role": "gpt", "content": "a", "train": "no"}]},
            "train is 'no', expected true",
        ),
        (
            {"messages": [{"role": "gpt", "content": "a", "train": True, "weight": 0}]},
            r"messages\[0\] \(assistant\): train and weight contradict each other",
        ),
        ({"messages": [{"role": "user", "tool_calls": [1]}]}, "only an assistant turn can"),
        ({"messages": [{"role": "gpt", "tool_calls": [1]}]}, r"tool_calls\[0\] is 1, expected"),
        ({"messages": [{"role": "gpt", "content": "a", "name": 3}]}, "name holds 3"),
        ({"messages": [{"role": "gpt", "content": "a", "reasoning": 3}]}, "reasoning_content"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\]"),
        ({"query": "a", "response": "b", "history": [["x"]]}, r"history\[0\] is \['x'\], expected"),
        (
            {"query": "a", "response": "b", "history": [["x", "y"], ["x", " "]]},
            r"history\[1\]: assistant is empty",
        ),
        ({"query": "a", "response": "b", "history": [["", "y"]]}, r"history\[0\]: user is empty"),
        ({"query": "a", "response": "b", "history": [["x", 3]]}, r"history\[0\] holds 3"),
        ({"text": "  "}, "column text is empty"),
    ],
)
def test_an_unusable_cell_is_named_with_row_and_column(values, message):
    with pytest.raises(RowError, match=f"rows.jsonl:17: .*{message}"):
        convert(values)


def messages(values):
    return [
        (m.role, m.content)
        for m in parse_messages(RowFields(values, Origin("a", 1), {}), "messages")
    ]


SPELLED = {
    "system": ["system", "developer", "Developer "],
    "user": ["user", "human", "Human"],
    "assistant": ["assistant", "gpt", "model", "bot", "chatgpt", "function_call"],
    "tool": ["tool", "function", "observation", "function_response", "ipython"],
}


@pytest.mark.parametrize(
    ("name", "role"), [(name, role) for role, names in SPELLED.items() for name in names]
)
def test_each_name_of_a_role_is_read(name, role):
    content = '{"name": "f"}' if name == "function_call" else "a"
    assert messages({"messages": [{"role": name, "content": content}]})[0][0] == role


@pytest.mark.parametrize(
    ("turns", "column", "expected"),
    [
        ([("system", "A "), ("human", "q")], "A", [("system", "A "), ("user", "q")]),
        ([("system", " "), ("human", "q")], "B", [("system", "B"), ("user", "q")]),
        ([("human", "q")], "B", [("system", "B"), ("user", "q")]),
        ([("human", "q")], " ", [("user", "q")]),
    ],
)
def test_a_system_column_leads_the_turns_that_bring_none(turns, column, expected):
    value = [{"from": role, "value": text} for role, text in turns]
    cells = RowFields({"conversations": value, "system": column}, Origin("a", 1), {})
    assert [(m.role, m.content) for m in parse_messages(cells, "conversations")] == expected


def test_a_system_column_that_differs_from_the_first_turn_is_a_fault():
    value = [{"from": "system", "value": "A"}, {"from": "human", "value": "q"}]
    cells = RowFields({"conversations": value, "system": "B"}, Origin("a", 1), {})
    with pytest.raises(RowError, match="a:1: column system has 'B', and the first turn 'A'"):
        parse_messages(cells, "conversations")


def test_content_parts_and_json_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"messages": [{"role": "user", "content": parts}]}) == [("user", "ab")]
    assert messages({"messages": '[{"role": "user", "content": "ab"}]'}) == [("user", "ab")]


def test_lists_side_by_side_are_turns_as_datasets_stores_them():
    item = convert({"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}})
    assert [(m.role, m.content) for m in item.messages] == [("user", "Hi"), ("assistant", "Hello")]
    for uneven in ({"from": ["human"], "value": []}, {"from": "human"}, {}):
        with pytest.raises(RowError, match=r"expected a list of turns|no turns|empty list"):
            convert({"conversations": uneven})


def test_a_number_comes_with_the_text_it_could_be():
    with pytest.raises(RowError) as caught:
        convert({"question": "2 + 2?", "answer": 4})
    assert '"4"' in caught.value.hint


def test_an_empty_system_turn_is_none():
    for empty in ("", None):
        turns = [{"role": "system", "content": empty}, {"role": "user", "content": "a"}]
        assert messages({"messages": turns}) == [("user", "a")]


CALL = {"type": "function", "function": {"name": "find", "arguments": {"q": "x"}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds."}}


def test_openai_tool_rows_and_llama_factory_rows_give_the_same_conversation():
    openai = {
        "messages": [
            {"role": "user", "content": "Find x"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "find", "arguments": '{"q": "x"}'}}],
            },
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "Here."},
        ],
        "tools": [TOOL],
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Find x"},
            {"from": "function_call", "value": '{"name": "find", "arguments": {"q": "x"}}'},
            {"from": "observation", "value": "found"},
            {"from": "gpt", "value": "Here."},
        ],
        "tools": '[{"name": "find", "description": "Finds."}]',
    }
    made = convert(openai)
    assert made == convert(sharegpt)
    assert [m.role for m in made.messages] == ["user", "assistant", "tool", "assistant"]
    assert made.messages[1].extra == {"tool_calls": [CALL]}
    assert made.tools == (TOOL,)


def test_the_old_function_call_key_and_its_role_are_read():
    old = [
        {"role": "assistant", "function_call": {"name": "find", "arguments": '{"q": "x"}'}},
        {"role": "function", "name": "find", "content": ""},
    ]
    call, result = parse_messages(RowFields({"messages": old}, Origin("a", 1), {}), "messages")
    assert call.extra == {"tool_calls": [CALL]}
    assert (result.role, result.content, result.extra) == ("tool", "", {"name": "find"})


def test_names_and_ids_of_results_are_kept():
    turns = [{"role": "tool", "content": "x", "name": "find", "tool_call_id": "call1"}]
    (turn,) = parse_messages(RowFields({"messages": turns}, Origin("a", 1), {}), "messages")
    assert turn.extra == {"name": "find", "tool_call_id": "call1"}


def test_null_keys_of_a_table_are_as_if_absent():
    """Parquet gives every turn every key of any turn."""
    keys = ("tool_calls", "function_call", "tool_call_id", "name", "train", "weight", "reasoning")
    turns = [{"role": "user", "content": "a", **dict.fromkeys(keys)}]
    (turn,) = parse_messages(RowFields({"messages": turns}, Origin("a", 1), {}), "messages")
    assert (turn.extra, turn.train) == ({}, True)


@pytest.mark.parametrize(
    ("mark", "trained"),
    [({"train": False}, False), ({"weight": 0}, False), ({"weight": 1}, True), ({}, True)],
)
def test_a_turn_may_be_left_out_of_the_loss(mark, trained):
    turns = [{"role": "assistant", "content": "b", **mark}]
    (turn,) = parse_messages(RowFields({"messages": turns}, Origin("a", 1), {}), "messages")
    assert turn.train is trained


def test_thoughts_have_one_name():
    for key in ("reasoning_content", "reasoning", "thinking"):
        turns = [{"role": "assistant", "content": "b", key: "hm"}]
        (turn,) = parse_messages(RowFields({"messages": turns}, Origin("a", 1), {}), "messages")
        assert turn.extra == {"reasoning_content": "hm"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "weight", "train"])
            | st.sampled_from(["name", "tool_calls", "function", "arguments"]),
            inner | st.sampled_from(["user", "assistant", "system", "tool", "function_call"]),
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(
        [
            ("question", "answer"),
            ("messages", "tools"),
            ("conversations", "tools"),
            ("text",),
            ("prompt", "completion"),
            ("query", "response", "history"),
        ]
    ),
    st.data(),
)
def test_any_json_in_a_column_gives_turns_or_a_row_fault(columns, data):
    values = {column: data.draw(JSON) for column in columns}
    try:
        item = convert(values)
    except RowError as fault:
        item = fault
    named = isinstance(item, RowError) and item.message.startswith("rows.jsonl:17: ")
    assert named or isinstance(item, Conversation | Document)


def test_schemas_and_calls_may_be_json_text_one_by_one():
    schema = {"name": "find", "parameters": {"type": "object", "properties": {}}}
    made = parse_tools([json.dumps(schema), schema], ValueError)
    assert made[0] == made[1] == {"type": "function", "function": schema}
    call = {"name": "find", "arguments": {"q": "x"}}
    first, second = parse_tool_calls([json.dumps(call), call], "turn 1", ValueError)
    assert first == second == {"type": "function", "function": call}
