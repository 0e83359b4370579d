"""KTO's mismatched answers follow TRL's rotation, and never answer the same prompt."""

import pytest

from lorakit.errors import DataError
from lorakit.train.preference_rows import PreferenceRows, TrainerRows, mismatched, with_answer_of
from lorakit.types import IGNORE, Example, Origin


def answered(prompt, answer, number=0):
    labels = [IGNORE] * len(prompt) + answer
    return Example(prompt + answer, labels, Origin("x", number), good=bool(number % 2))


def rows_of(prompts):
    return [answered([1, p], [50 + i, 2], i) for i, p in enumerate(prompts)]


def test_answers_are_rotated_by_one():
    rows = PreferenceRows(rows_of([10, 11, 12, 13]), mismatch=True)
    assert rows.partners.tolist() == [3, 0, 1, 2]
    first = rows[0]
    assert first.sequences[0].input_ids == [1, 10, 50, 2]
    assert first.sequences[1].input_ids == [1, 10, 53, 2]
    assert first.sequences[1].labels == [IGNORE, IGNORE, 53, 2]
    assert [row.good for row in rows[1:3]] == [True, False]


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [([10, 10, 11, 11], [3, 3, 1, 1]), ([10, 11, 10, 10], [1, 0, 1, 1]), ([5, 6], [1, 0])],
)
def test_rows_of_one_prompt_get_the_answer_of_another(prompts, partners):
    rows = PreferenceRows(rows_of(prompts), mismatch=True)
    assert rows.partners.tolist() == partners
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partners))


def test_one_prompt_alone_is_refused_for_training_and_kept_when_held_out():
    with pytest.raises(DataError, match="at least two prompts"):
        PreferenceRows(rows_of([10, 10]), mismatch=True)
    held = PreferenceRows(rows_of([10, 10]), mismatch=True, held_out=True)
    assert mismatched(held.rows, held_out=True).tolist() == [0, 1]


def test_rows_of_a_trainer_have_the_reference():
    import numpy as np

    rows = PreferenceRows(rows_of([10, 11]), mismatch=True)
    rows.reference = np.array([[-1.5, -2.0], [-3.0, -4.0]], np.float32)
    assert TrainerRows(rows)[1]["reference"] == [-3.0, -4.0]
    assert rows[0].reference == (-1.5, -2.0)
    assert len(TrainerRows(rows)) == 2


def test_the_second_sequence_has_a_prompt_and_an_answer():
    row, other = ({"input_ids": e.input_ids, "labels": e.labels} for e in rows_of([10, 11]))
    found = with_answer_of(row, other)
    assert found["second"] == 4
    assert found["input_ids"] == [1, 10, 50, 2, 1, 10, 51, 2]
