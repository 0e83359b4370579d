"""Scores and answers side by side, from the plain values of eval.json."""

from lorakit.records import EvalResult, EvalScore, Sample
from lorakit.report.answers import scores


def result(*samples, data="held out"):
    return EvalResult(EvalScore(2.0, 7.389, 9), EvalScore(1.0, 2.718, 1200), data, samples)


def test_scores_and_their_change():
    text = "".join(scores(result().as_dict()))
    assert "7.39" in text
    assert "-1.0000" in text
    assert "-63.2%" in text
    assert "Held out: held out, 1,200 trained tokens." in text


def test_each_question_has_three_answers_as_text():
    sample = Sample("<q>", "<r>", "<b>", " <t>\n")
    text = "".join(scores(result(sample).as_dict()))
    assert '<div class="answers"><p>&lt;q&gt;</p>' in text
    assert '<section class="base"><h3>base</h3>&lt;b&gt;</section>' in text
    assert '<section class="tuned"><h3>tuned</h3>&lt;t&gt;</section>' in text
    assert '<section class="reference"><h3>reference</h3>&lt;r&gt;</section>' in text


def test_the_folders_that_lead_to_the_data_are_left_out():
    text = "".join(scores(result(data="/home/me/held.jsonl").as_dict()))
    assert "held.jsonl" in text
    assert "/home/me" not in text
