"""Base and tuned are compared on the rows that both have; failed rows are counted and named."""

import pytest

from lorakit.evaluation.task_rows import MetricRows, paired_scores


def rows(values, failures=(), **more):
    return MetricRows("task", "right", values, dict(failures), **more)


def test_a_row_that_failed_for_one_model_is_left_out_for_both():
    notes = []
    base = rows({"a:1": 0.0, "a:2": 1.0, "a:3": 0.0})
    tuned = rows({"a:1": 1.0, "a:2": 1.0}, {"a:3": "KeyError: 'x'"})
    (score,) = paired_scores([base], [tuned], notes.append)
    assert (score.rows, score.base, score.tuned, score.failed) == (2, 0.5, 1.0, 1)
    assert score.change == 0.5
    assert notes == [
        "task: right failed on 1 of 3 rows, left out for both (first: a:3: KeyError: 'x')"
    ]


def test_verdicts_follow_the_interval_and_the_direction():
    many = dict.fromkeys(range(50), 0.0)
    up = {i: float(i % 2 or i > 20) for i in range(50)}
    (better,) = paired_scores([rows(many)], [rows(up)], print)
    assert better.low > 0
    assert better.verdict == "better"
    (worse,) = paired_scores(
        [rows(many, higher_is_better=False)], [rows(up, higher_is_better=False)], print
    )
    assert worse.verdict == "worse"
    (same,) = paired_scores([rows(up)], [rows({**up, 0: 1.0, 1: 0.0})], print)
    assert same.verdict == "unclear"


def test_any_aggregate_is_used_for_score_and_interval():
    base, tuned = {i: float(i) for i in range(9)}, {i: 2.0 * i for i in range(9)}
    (score,) = paired_scores([rows(base)], [rows(tuned, aggregate=max)], print)
    assert (score.base, score.tuned) == (8.0, 16.0)
    assert score.low <= 8.0 <= score.high


def test_nothing_in_common_gives_no_score():
    notes = []
    assert paired_scores([rows({1: 1.0})], [rows({}, {1: "bad"})], notes.append) == []
    assert "failed on 1 of 1 rows" in notes[0]
    assert paired_scores([], [rows({1: 1.0})], notes.append) == []
    assert "no value for the base" in notes[1]
    assert rows({}).summary() is None
    assert rows({1: 1.0, 2: 0.0}).summary() == pytest.approx(0.5)
