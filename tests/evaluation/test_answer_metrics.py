"""Each metric on answers that are right, wrong and odd; a row it cannot score is named."""

import json

import pytest

from lorakit.errors import RecipeError
from lorakit.evaluation.answer_metrics import parse_metric, value_of
from lorakit.types import Message


def scored(metric, answer, reference, folders=(), **extra):
    from pathlib import Path

    found = parse_metric(metric, [*folders, Path()])
    return value_of(found, answer, reference, Message("assistant", reference, extra))


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "value"),
    [
        ("exact_match", " Oslo\n", "Oslo", 1),
        ("exact_match", "oslo", "Oslo", 0),
        ("contains", "It is OSLO.", "Oslo", 1),
        ("contains", "It is Bergen.", "Oslo", 0),
        ("regex", "on 2026-01-31.", r"\d{4}-\d\d-\d\d", 1),
        ("regex", "today", r"\d{4}-\d\d-\d\d", 0),
        (r"regex:#### (-?\d+)", "so\n#### 72", "48+24\n#### 72", 1),
        (r"regex:#### (-?\d+)", "72", "48+24\n#### 72", 0),
        ("numeric", "It costs $1,000.", "1000", 1),
        ("numeric", "first 5, then 7.0", "12-5 = 7", 1),
        ("numeric", "-3", "3", 0),
        ("numeric", "none", "3", 0),
        ("numeric", "0.30000000001", ".3", 1),
        ("json", '{"a": 1, "b": [2]}', '{"b":[2],"a":1}', 1),
        ("json", "{'a': 1}", '{"a": 1}', 0),
        ("rouge", "the cat sat", "the cat sat", 1),
        ("rouge:rouge1", "the dog", "the cat", 0.5),
    ],
)  # fmt: skip
def test_values(metric, answer, reference, value):
    assert scored(metric, answer, reference) == pytest.approx(value)


def test_tool_calls_are_compared_as_values_in_any_order():
    calls = [
        {"function": {"name": "a", "arguments": '{"x": 1, "y": 2}'}},
        {"function": {"name": "b", "arguments": {}}},
    ]
    two = '{"name": "b", "arguments": {}} {"name": "a", "arguments": {"y": 2, "x": 1}}'
    assert scored("tool_calls", two, "", tool_calls=calls) == 1
    assert scored("tool_calls", '{"name": "b", "arguments": {}}', "", tool_calls=calls) == 0
    assert scored("tool_calls", "no call", "no call either") == 1


def test_answers_are_checked_against_a_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["name"]}))
    metric = f"json_schema:{path}"
    assert scored(metric, '{"name": "x"}', "") == 1
    assert scored(metric, '{"age": 3}', "") == 0
    assert scored(metric, "no json", "") == 0
    assert scored("json_schema:schema.json", '{"name": "x"}', "", [tmp_path]) == 1
    path.write_text('{"type": "objekt"}')
    with pytest.raises(RecipeError, match=r"schema.json: not a JSON schema"):
        scored(metric, "", "")


def test_a_function_of_the_user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def longer(answer, reference):\n    return len(answer) > len(reference)\n"
        "def broken(answer, reference):\n    return {}[answer]\n"
        "def odd(answer, reference):\n    return float('nan')\n"
    )
    assert parse_metric(f"{path}:longer").name == "longer"
    assert scored(f"{path}:longer", "abc", "a") == 1
    assert scored(f"{path}:broken", "abc", "a") == "KeyError: 'abc'"
    assert scored(f"{path}:odd", "abc", "a") == "gave nan"
    with pytest.raises(RecipeError, match=r"no function longr; did you mean longer\?"):
        parse_metric(f"{path}:longr")
    path.write_text("raise RuntimeError('no')")
    with pytest.raises(RecipeError, match="cannot be imported: RuntimeError: no"):
        parse_metric(f"{path}:longer")


@pytest.mark.parametrize(
    ("metric", "reference", "reason"),
    [
        ("numeric", "no digits", "the reference has no number"),
        ("contains", " ", "the reference is empty"),
        ("json", "{", "the reference is not JSON"),
        ("regex", "(", "the reference is not a pattern"),
        ("regex:#### (.*)", "72", "is not in the reference"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(metric, reference, reason):
    assert reason in scored(metric, "answer", reference)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("exact_mach", r"'exact_mach' is unknown; did you mean exact_match\?"),
        ("numeric:3", "numeric takes no argument"),
        ("regex:(", "not a pattern"),
        ("json_schema", "no schema"),
        ("json_schema:none.json", "none.json: no such file"),
        ("rouge:rouge9", "rouge:rouge9: unknown"),
        ("none.py:f", "none.py: no such file"),
    ],
)
def test_wrong_metrics_are_refused(metric, message):
    with pytest.raises(RecipeError, match=message):
        parse_metric(metric)
