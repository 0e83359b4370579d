"""Rows as other tools write them mean here what they mean there."""

import json

import pytest

from lorakit.data.formats.columns import ColumnWatch
from lorakit.data.formats.marks import unknown_marks
from lorakit.data.formats.row_formats import guess_format, to_conversation
from lorakit.data.issues import RowError
from lorakit.errors import DataError
from lorakit.types import Origin, Row


def convert(values):
    row = Row(values, Origin("rows.jsonl", 1))
    return to_conversation(row, guess_format([row]), None)


def chat(*answers):
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": "and?"}, {"role": "assistant", **answer}]
    return {"messages": turns}


def turns(item):
    return [(m.role, m.content) for m in item.messages]


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "noon"}}}
ASK = {"role": "user", "content": "tide?"}
END = {"role": "assistant", "content": "high"}


# -- marks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        {"train": False},
        {"training": False},
        {"trainable": False},
        {"loss": False},
        {"loss": 0.0},
        {"loss_mask": 0},
        {"loss_mask": "0"},  # text in LoongForge's data
        {"weight": 0},
        {"masked": True},
    ],
    ids=str,
)
def test_a_mark_of_another_tool_leaves_its_answer_out(mark):
    item = convert(chat({"content": "wrong", **mark}, {"content": "right"}))
    assert [m.train for m in item.messages if m.role == "assistant"] == [False, True]


def test_marks_that_contradict_each_other_name_themselves():
    with pytest.raises(RowError, match="weight and masked contradict"):
        convert(chat({"content": "a", "weight": 1, "masked": True}))


def test_a_schema_with_marks_on_all_turns_is_read():
    turn = {"role": "user", "content": "q", "loss_mask": 1, "masked": False}
    item = convert({"messages": [turn, {"role": "assistant", "content": "a", "loss_mask": 1}]})
    assert all(m.train for m in item.messages)


def test_flags_without_a_known_meaning_are_named():
    row = chat({"content": "a", "keep": False, "turn_id": 3, "name": "bob"}, {"content": "b"})
    assert list(unknown_marks(row)) == ["keep"]


@pytest.mark.parametrize("as_text", [False, True])
def test_answers_inside_a_prompt_are_context(as_text):
    prompt = [ASK, {"role": "assistant", "content": "low"}, {"role": "user", "content": "sure?"}]
    row = {"prompt": prompt, "completion": [END]}
    item = convert({k: json.dumps(v) for k, v in row.items()} if as_text else row)
    assert [(m.content, m.train) for m in item.messages if m.role == "assistant"] == [
        ("low", False),
        ("high", True),
    ]


# -- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "systemPrompt"])
def test_a_system_text_in_a_column_leads_the_chat(name):
    item = convert({**chat({"content": "aye"}), name: "You are a pirate."})
    assert turns(item)[0] == ("system", "You are a pirate.")


@pytest.mark.parametrize("name", ["thinking", "reasoning", "Complex_CoT", "reasoning_content"])
def test_thoughts_in_a_column_are_the_thoughts_of_the_answer(name):
    item = convert({"question": "6x7?", name: "six times seven", "answer": "42"})
    assert item.messages[-1].extra == {"reasoning_content": "six times seven"}


def test_a_level_of_reasoning_is_no_thought():
    item = convert({"question": "6x7?", "reasoning": "high", "answer": "42"})
    assert item.messages[-1].extra == {}


def test_functions_of_the_old_openai_form_are_tools():
    schema = {"name": "tide", "parameters": {"type": "object", "properties": {}}}
    item = convert({"messages": [ASK, END], "functions": [schema]})
    assert item.tools == ({"type": "function", "function": schema},)


@pytest.mark.parametrize("value", [" ", "\n", "[]", "null", [], None, float("nan")], ids=repr)
def test_blank_tools_are_none(value):
    assert convert({"messages": [ASK, END], "tools": value}).tools == ()


def test_a_nan_of_pandas_is_an_empty_cell():
    row = {"instruction": "Add 1 and 2", "input": float("nan"), "output": "3"}
    assert turns(convert(row)) == [("user", "Add 1 and 2"), ("assistant", "3")]


@pytest.mark.parametrize("name", ["label", "is_good", "desirable", "approved"])
def test_rows_that_are_marked_as_bad_stop_even_if_all_are(name):
    row = Row({"prompt": "a", "completion": "b", name: False}, Origin("kto.jsonl", 1))
    with pytest.raises(DataError, match=f"column '{name}' judges the answers"):
        ColumnWatch(("prompt", "completion"), None).check(row)


# -- tools ----------------------------------------------------------------------------------------


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


# -- content parts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "low"},
        {"type": "input_text", "text": "low"},
        {"type": "output_text", "text": "low", "annotations": []},
        {"type": "text", "value": "low"},
        {"text": "low"},
        {"type": "refusal", "refusal": "low", "text": None},
    ],
    ids=str,
)
def test_text_parts_of_any_api_are_text(part):
    assert turns(convert(chat({"content": [part]})))[1] == ("assistant", "low")


def test_the_blocks_of_anthropic_are_thoughts_calls_and_results():
    use = {"type": "tool_use", "id": "t1", "name": "tide", "input": {"at": "noon"}}
    blocks = [{"type": "thinking", "thinking": "look"}, {"type": "text", "text": "I look."}, use]
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "9"}],
    }
    schema = {"name": "tide", "input_schema": {"type": "object", "properties": {}}}
    item = convert(
        {
            "system": "Be brief.",
            "messages": [
                ASK,
                {"role": "assistant", "content": blocks},
                {"role": "user", "content": [result]},
                END,
            ],
            "tools": [schema],
        }
    )
    assert turns(item) == [
        ("system", "Be brief."),
        ("user", "tide?"),
        ("assistant", "I look."),
        ("tool", "9"),
        ("assistant", "high"),
    ]
    assert item.messages[2].extra["reasoning_content"] == "look"
    assert item.messages[2].extra["tool_calls"][0]["function"] == CALL["function"]
    assert item.tools[0]["function"]["parameters"] == schema["input_schema"]


def test_gemini_calls_and_results_are_read():
    call = {"functionCall": {"name": "tide", "args": {"at": "noon"}}}
    result = {"functionResponse": {"name": "tide", "response": {"m": 3}}}
    contents = [("user", "tide?"), ("model", call), ("user", result), ("model", "high")]
    parts = [
        {"role": role, "parts": [{"text": p} if isinstance(p, str) else p]} for role, p in contents
    ]
    item = convert({"contents": parts})
    assert [m.role for m in item.messages] == ["user", "assistant", "tool", "assistant"]
    assert item.messages[1].extra["tool_calls"][0]["function"] == CALL["function"]
    assert item.messages[2].content == '{"m": 3}'


@pytest.mark.parametrize("kind", ["image_url", "input_file", "video", "document"])
def test_a_part_that_is_no_text_is_named(kind):
    with pytest.raises(RowError, match=f"a part of type {kind!r}, expected text"):
        convert(chat({"content": [{"type": kind, kind: {}}]}))
