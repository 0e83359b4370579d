"""Bodies as OpenAI's clients send them are read; what is not served is refused by its key."""

import pytest

from lorakit.data.issues import RowError
from lorakit.serve.requests import BadOrder, read_order

ASK = [{"role": "user", "content": "Hi"}]


def test_a_plain_body_gets_openais_defaults():
    order = read_order({"model": "m", "messages": ASK})
    assert (order.temperature, order.top_p, order.max_tokens, order.stop) == (1.0, 1.0, None, ())
    assert not order.stream
    assert order.messages[0].content == "Hi"


def test_parts_developers_and_tool_calls_are_read():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    found = read_order({"messages": turns, "stop": "END", "max_completion_tokens": 5})
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "tool"]
    assert found.messages[1].content == "ab"
    assert found.messages[2].extra["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert (found.stop, found.max_tokens) == (("END",), 5)


WRONG = {
    "messages": [{}, {"messages": []}, {"messages": "Hi"}],
    "messages[0]": [
        {"messages": [{"role": "user"}]},
        {"messages": ["Hi"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ],
    "n": [{"messages": ASK, "n": 2}],
    "temperature": [{"messages": ASK, "temperature": t} for t in (-1, "hot", True)],
    "max_tokens": [{"messages": ASK, "max_tokens": n} for n in (0, 10**9, float("inf"))],
    "stop": [{"messages": ASK, "stop": s} for s in ([1], 5, {"a": 1}, ["x"] * 99)],
    "tools": [{"messages": ASK, "tools": t} for t in ("f", [1], {"a": 1})],
    "stream_options": [{"messages": ASK, "stream_options": "x"}],
    "chat_template": [{"messages": ASK, "chat_template": "{{ 10**100000000 }}"}],
    "chat_template_kwargs": [{"messages": ASK, "chat_template_kwargs": {"a": 1}}],
    "seed": [{"messages": ASK, "seed": s} for s in (float("nan"), float("inf"), -1, "x")],
    "logprobs": [{"messages": ASK, "logprobs": True}],
    "response_format": [{"messages": ASK, "response_format": {"type": "json_object"}},
                        {"messages": ASK, "response_format": "json"}],
}  # fmt: skip


@pytest.mark.parametrize("param", WRONG)
def test_a_wrong_key_is_named(param):
    for body in WRONG[param]:
        with pytest.raises(BadOrder) as caught:
            read_order(body)
        assert caught.value.as_dict()["error"]["param"] == param


def test_a_broken_tool_call_is_a_fault_of_the_request():
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]}
    with pytest.raises(RowError, match=r"messages\[0\].tool_calls\[0\]"):
        read_order({"messages": [turn]})
    with pytest.raises(BadOrder, match="no JSON object"):
        read_order([1])
