"""Scores and answers in a terminal; an answer is never read as markup."""

from lorakit.display.evaluation_view import evaluation_view
from lorakit.display.rich_output import as_text
from lorakit.types import EvalResult, EvalScore, Sample


def shown(*samples):
    return as_text(
        evaluation_view(
            EvalResult(EvalScore(2.0, 7.389, 9), EvalScore(1.0, 2.718, 1200), "held out", samples)
        )
    )


def test_scores_change_and_answers_are_there():
    text = shown(Sample("Who?", "Ann", "Bob", "Ada"))
    for part in ("held-out: held out (1,200 trained tokens)", "-1.0000", "-63.2%", "7.39", "2.72"):
        assert part in text
    for part in ("Who?", "Ann", "Bob", "Ada", "reference"):
        assert part in text


def test_a_long_word_is_folded_not_cut():
    assert "…" not in shown(Sample("q", "ness" * 60, "b", "t"))


def test_brackets_and_codes_in_answers_stay_as_they_are():
    text = shown(Sample("[/x] :smile:", "[/INST] [b]", "[link=javascript:a()]", "\x1b[2J"))
    for part in ("[/x] :smile:", "[/INST] [b]", "[link=javascript:a()]", "\\x1b[2J"):
        assert part in text
    assert "\x1b" not in text
