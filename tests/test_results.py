"""Records that show themselves stay the records they were made of."""

import re

import pytest

from lorakit.results import Evaluation
from lorakit.types import EvalResult, EvalScore, Sample


@pytest.fixture
def result():
    sample = Sample("Who?", "Ann", "Bob", "Ann")
    return EvalResult(EvalScore(2.0, 7.4, 9), EvalScore(1.0, 2.7, 9), "held out", (sample,))


def test_the_record_is_kept_whole(result):
    shown = Evaluation.of(result)
    assert shown.as_dict() == result.as_dict()
    assert isinstance(shown, EvalResult)


def test_a_notebook_gets_the_answers_side_by_side(result):
    html = Evaluation.of(result)._repr_html_()
    assert html.startswith("<pre ")
    assert re.search(r"Bob +│ Ann +│ Ann", re.sub("<[^>]+>", "", html))


def test_text_has_no_color_and_one_width(result):
    text = repr(Evaluation.of(result))
    assert "\x1b" not in text
    assert "held-out: held out (9 trained tokens)" in text
    assert max(map(len, text.splitlines())) <= 100
