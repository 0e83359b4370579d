"""Each alarm rises on the metrics of its collapse, and not on those of a run that learns."""

import pytest

from lorakit.recipe.schema import Recipe
from lorakit.train.rollout_alarms import WINDOW, RolloutAlarms

RECIPE = Recipe.model_validate(
    {
        "model": "demo",
        "data": "rows.jsonl",
        "objective": "grpo",
        "reward_funcs": ["numeric_answer", {"name": "regex", "pattern": "a"}],
        "max_completion_length": 64,
    }
)
NAMES = ["numeric_answer", "regex"]


def rows(count=3 * WINDOW, **series):
    """Rows of a healthy run; `series` maps a metric to a function of the share of steps done."""
    usual = {
        "frac_reward_zero_std": lambda t: 0.3,
        "completions/mean_length": lambda t: 20.0,
        "completions/clipped_ratio": lambda t: 0.0,
        "entropy": lambda t: 1.0 - 0.5 * t,
        "reward": lambda t: 0.2 + t,
        "rewards/numeric_answer": lambda t: 0.1 + 0.5 * t,
        "rewards/regex": lambda t: 0.1 + 0.5 * t,
        "rewards/numeric_answer/std": lambda t: 0.3,
        "rewards/regex/std": lambda t: 0.3,
    }
    made = {**usual, **series}
    return [
        {"step": i + 1, **{name: value(i / count) for name, value in made.items()}}
        for i in range(count)
    ]


def alarms_of(given):
    alarms = RolloutAlarms(RECIPE, NAMES)
    return [text for row in given for text in alarms.row(row)]


def test_a_run_that_learns_has_none():
    assert alarms_of(rows()) == []


@pytest.mark.parametrize(
    ("series", "words"),
    [
        ({"frac_reward_zero_std": lambda t: 0.95}, "95% of the groups all completions have equal"),
        (
            {
                "completions/mean_length": lambda t: 10 + 50 * t,
                "completions/clipped_ratio": lambda t: 0.4 + 0.6 * t,
            },
            "tokens, and",
        ),
        (
            {"rewards/regex": lambda t: t, "rewards/numeric_answer": lambda t: 0.1},
            "may collect the form alone",
        ),
        ({"entropy": lambda t: 1.0 if t < 0.4 else 0.001}, "entropy of the policy fell"),
        (
            {"rewards/regex": lambda t: 1.0, "rewards/regex/std": lambda t: 0.0},
            "reward regex gave 1 to every completion",
        ),
    ],
    ids=["groups", "length", "form", "entropy", "constant"],
)
def test_each_collapse_is_named_once(series, words):
    found = alarms_of(rows(**series))
    assert len([text for text in found if words in text]) == 1, found
    assert found[0].startswith("step ")


def test_an_alarm_rises_again_after_its_cause_was_absent():
    given = rows(60, frac_reward_zero_std=lambda t: 0.1 if 0.3 < t < 0.6 else 0.95)
    assert len(alarms_of(given)) == 2


def test_a_resumed_run_knows_the_rows_before():
    given, alarms = rows(frac_reward_zero_std=lambda t: 0.95), RolloutAlarms(RECIPE, NAMES)
    alarms.replay(given[:WINDOW])
    assert [text for row in given[WINDOW:] for text in alarms.row(row)] == []
