"""Built-in reward functions, and the checks of what any function returns."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from lorakit.errors import RecipeError, WorkError
from lorakit.recipe.entries import RewardName
from lorakit.recipe.schema import Recipe
from lorakit.reinforcement.rewards import (
    AnswerReward,
    Attempt,
    LengthReward,
    RewardSet,
    SchemaReward,
    final_answer,
    json_part,
    reward_file,
    unique_names,
)


def attempts(*texts, tokens=1, **fields):
    return [Attempt([], text, [0] * tokens, fields) for text in texts]


def reward_set(*entries, notes=None):
    recipe = Recipe.model_validate(
        {"model": "demo", "data": "x", "objective": "grpo", "reward_funcs": list(entries)}
    )
    return RewardSet(recipe, [Path()], (notes if notes is not None else []).append)


def test_final_answers():
    assert final_answer("so 6 x 7\n#### 42\nbye") == "42"
    assert final_answer(r"hence \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer("  New\n Delhi ") == "New Delhi"


def test_exact_answers():
    score = AnswerReward("answer", numeric=False)
    found = score(attempts("Paris", " Paris.", "It is Paris", "#### Paris", answer="Paris"))
    assert found == [1.0, 1.0, 0.0, 1.0]


def test_numeric_answers():
    score = AnswerReward("answer", numeric=True)
    texts = attempts("It is 1,000", "1000.0", "nothing", "-1000", answer="long way #### 1000")
    assert score(texts) == [1.0, 1.0, 0.0, 0.0]
    assert score(attempts("3", answer="three")) == [None]


def test_length_falls_before_the_limit():
    score = LengthReward(limit=100, buffer=20)
    found = [score(attempts("", tokens=n))[0] for n in (80, 90, 100, 200)]
    assert found == [0.0, -0.5, -1.0, -1.0]


def test_json_of_a_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["a"]}))
    score = SchemaReward(None, path)
    texts = ['{"a": 1}', '```json\n{"a": 1}\n```', '{"b": 1}', "no"]
    assert score(attempts(*texts)) == [1.0, 1.0, 0.0, 0.0]
    assert json_part("x ```\n1\n```") == "x ```\n1\n```"
    of_row = SchemaReward("schema", None)
    assert of_row(attempts("3", schema='{"type": "integer"}')) == [1.0]
    assert of_row(attempts("3", schema={"type": "nothing"})) == [None]


def test_a_file_that_is_no_schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": 3}')
    with pytest.raises(RecipeError, match="not a JSON schema"):
        SchemaReward(None, path)


def test_rewards_are_weighted_and_named():
    rewards = reward_set("exact_answer", {"name": "length", "limit": 4, "weight": 0.5})
    assert rewards.describe() == "exact_answer, 0.5 x length"
    found = rewards.score(attempts("a", "b", tokens=9, answer="a"))
    assert found.total.tolist() == [0.5, -0.5]
    assert found.parts.tolist() == [[1.0, -1.0], [0.0, -1.0]]
    assert unique_names(["f", "f", "g"]) == ["f", "f_2", "g"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "reward exact_answer: returned 1 rewards, expected 2"),
        ("ab", "returned str, expected a list of 2 numbers"),
        ([float("nan"), None], "no reward function scored any of 2 completions"),
    ],
)
def test_wrong_results_are_one_message(values, words):
    rewards = reward_set("exact_answer")
    rewards.functions[0] = lambda attempts: values
    with pytest.raises(WorkError, match=words):
        rewards.score(attempts("a", "b"))


def test_values_that_are_no_numbers_are_counted_and_left_out():
    notes = []
    rewards = reward_set("exact_answer", notes=notes)
    rewards.functions[0] = lambda attempts: [float("nan"), 1.0, "x", float("inf")]
    found = rewards.score(attempts("a", "b", "c", "d"))
    assert np.isnan(found.total).tolist() == [True, False, True, True]
    assert rewards.faults == {"exact_answer": 3}
    assert len(notes) == 1


def test_the_digest_covers_settings_files_and_rows(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text("{}")
    entry = {"name": "json_schema", "schema_file": str(path)}
    rows = np.arange(3, dtype=np.uint64)
    first = reward_set(entry).digest(rows)
    assert first == reward_set(entry).digest(rows)
    assert first != reward_set(entry).digest(rows[:2])
    assert first != reward_set({**entry, "weight": 2.0}).digest(rows)
    path.write_text('{"type": "object"}')
    assert first != reward_set(entry).digest(rows)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"mine.py: no such file"):
        reward_file("mine.py", [tmp_path])


def test_every_name_of_the_schema_can_be_built():
    settings = {
        "regex": {"pattern": "a"},
        "length": {"limit": 3},
        "judge": {"url": "http://127.0.0.1:1/v1", "model": "m"},
    }
    names = get_args(RewardName)
    rewards = reward_set(*({"name": n, **settings.get(n, {})} for n in names))
    assert rewards.names == list(names)
