"""Calls are read from the forms in which models write them, and text is no call."""

import pytest

from lorakit.evaluation.tool_calls import called_in, expected_calls
from lorakit.types import Message

OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "weather", "arguments": {"city": "Oslo"}}',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        'I look. [{"name": "weather", "parameters": {"city": "Oslo"}}] Done {not json}.',
        '{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}',
        '[weather(city="Oslo")]',
        'weather(city="Oslo")',
    ],
)
def test_forms_of_one_call(answer):
    assert called_in(answer) == [OSLO]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "It is 3 degrees.",
        '{"name": "Anna", "age": 3}',
        "[1, 2]",
        "print(1)",
        "[{" * 3000,
        "f(x=g())",
    ],
)
def test_texts_without_a_call(answer):
    assert called_in(answer) == []


def test_several_calls_and_their_order():
    two = '<tool_call>{"name": "a", "arguments": {}}</tool_call>{"name": "b", "arguments": {}}'
    assert [call["name"] for call in called_in(two)] == ["a", "b"]


def test_calls_of_a_reference():
    given = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    assert expected_calls(Message("assistant", "", {"tool_calls": given})) == [OSLO]
    given = [{"function": {"name": "now", "arguments": None}}]
    assert expected_calls(Message("assistant", "", {"tool_calls": given})) == [
        {"name": "now", "arguments": {}}
    ]
    assert expected_calls(Message("assistant", "none")) == []
