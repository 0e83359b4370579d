"""Python's parser, but a key with two values is an error."""

import json

import pytest

from lorakit.data.json_values import TwoValuesError, loads


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"a": 1, "a": 2}', 'the key "a" has two values: 1 and 2'),
     ('{"m": [{"b": {"ö": "x", "ö": null}}]}', 'the key "ö" has two values: "x" and null'),
     ('{"a": 1, "a": true}', "1 and true"),
     ('{"a": 1, "a": 1, "a": 3}', "1 and 3"),
     ('{"\\u0061": 1, "a": 2}', "1 and 2"),
     ('{"a": {"x": 1}, "a": {"x": 2}}', '{"x": 1} and {"x": 2}')],
)  # fmt: skip
def test_two_values_are_named(text, words):
    with pytest.raises(TwoValuesError) as caught:
        loads(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "b": 1}', '{"a": 1, "a": 1}', '{"a": NaN, "a": NaN}', '[{"a": 1}, {"a": 2}]',
     '{"a": {"x": 1, "y": 2}, "a": {"y": 2, "x": 1}}', '"a"', "1.5", "[]", "{}"],
)  # fmt: skip
def test_all_else_is_what_the_library_reads(text):
    assert repr(loads(text)) == repr(json.loads(text))
