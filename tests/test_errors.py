"""Errors say what, and what to do; the exit code follows the class."""

import pytest

from lorakit import errors


def test_message_and_hint_are_two_lines():
    error = errors.DataError("x.jsonl:3: empty", hint="fill it")
    assert str(error) == "x.jsonl:3: empty\nhint: fill it"
    assert str(errors.DataError("plain")) == "plain"


@pytest.mark.parametrize(
    ("kind", "code"),
    [(errors.RecipeError, 2), (errors.DataError, 2), (errors.RunError, 2), (errors.WorkError, 1)],
)
def test_exit_codes(kind, code):
    assert kind("x").exit_code == code
    assert issubclass(kind, errors.LorakitError)


def test_what_cannot_be_printed_is_shown_by_its_code():
    assert (
        str(errors.LorakitError("found: \ud800", hint="\udfff")) == "found: \\ud800\nhint: \\udfff"
    )


def test_a_library_error_is_one_line():
    assert errors.first_line(ValueError("\none\ntwo")) == "one"
    assert errors.first_line(ValueError()) == "ValueError"
    assert len(errors.first_line(ValueError("x" * 999))) == 200
