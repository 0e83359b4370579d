"""Unusable cells become faults that name row and column; usable spellings become turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.check import RowFault
from lorakit.data.formats import guess_format, to_conversation
from lorakit.data.turns import Cells, turns_of
from lorakit.records import Conversation, Document, Origin, Row

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
        ({"question": "a", "answer": 4}, "column answer holds 4 where a text is expected"),
        ({"question": ["a"], "answer": "b"}, "column question holds"),
        ({"question": "a", "answer": "\ud800"}, "half a surrogate"),
        ({"question": "a", "answer": NESTED}, "column answer holds"),
        ({"messages": None}, "column messages is null"),
        ({"messages": []}, "empty list"),
        ({"messages": "hello"}, "column messages is 'hello', expected a list of turns"),
        ({"messages": "[broken"}, "is not JSON"),
        ({"messages": ["hello"]}, r"messages\[0\] is 'hello', expected an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] \(user\) has no content"),
        ({"messages": [{"role": None, "content": "a"}]}, r"messages\[0\] has the role null"),
        ({"messages": [{"role": "alien", "content": "a"}]}, "known: system"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "tool calls"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "left untrained"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\]"),
        ({"query": "a", "response": "b", "history": [["x"]]}, r"history\[0\]"),
        ({"text": "  "}, "column text is empty"),
    ],
)
def test_an_unusable_cell_is_named_with_row_and_column(values, message):
    with pytest.raises(RowFault, match=f"rows.jsonl:17: .*{message}"):
        convert(values)


def messages(values):
    return [(m.role, m.content) for m in turns_of(Cells(values, Origin("a", 1), {}), "messages")]


def test_content_parts_and_json_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"messages": [{"role": "user", "content": parts}]}) == [("user", "ab")]
    assert messages({"messages": '[{"role": "user", "content": "ab"}]'}) == [("user", "ab")]


def test_an_empty_system_turn_is_none():
    for empty in ("", None):
        turns = [{"role": "system", "content": empty}, {"role": "user", "content": "a"}]
        assert messages({"messages": turns}) == [("user", "a")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "weight"]),
            inner | st.sampled_from(["user", "assistant", "system", "text"]),
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(
        [
            ("question", "answer"),
            ("messages",),
            ("conversations",),
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
    except RowFault as fault:
        item = fault
    named = isinstance(item, RowFault) and item.message.startswith("rows.jsonl:17: ")
    assert named or isinstance(item, Conversation | Document)
