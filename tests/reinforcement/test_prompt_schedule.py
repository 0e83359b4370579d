"""Rows of a rollout: each prompt once an epoch, a function of seed and number."""

from lorakit.reinforcement.prompt_schedule import PromptSchedule


def test_an_epoch_has_each_prompt_once_in_an_order_of_its_own():
    schedule = PromptSchedule(10, 4, seed=1)
    rows = [row for number in range(5) for row in schedule.rows(number)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_a_rollout_depends_on_seed_and_number_alone():
    later = PromptSchedule(10, 4, seed=1)
    later.rows(7)
    assert later.rows(2) == PromptSchedule(10, 4, seed=1).rows(2)
    assert PromptSchedule(10, 4, seed=2).rows(2) != later.rows(2)


def test_a_rollout_larger_than_the_data():
    assert sorted(PromptSchedule(3, 7, seed=0).rows(0)[:3]) == [0, 1, 2]
