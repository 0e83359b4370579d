"""Content parts of any API are read for what they are."""

import pytest

from lorakit.data.issues import RowError

from .made_rows import ASK, CALL, END, chat, convert, turns


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
