"""Marks of a judge: read from replies, asked once per different request."""

import pytest

from lorakit.recipe.entries import RewardFunction
from lorakit.reinforcement.judge_reward import JudgeReward, read_mark
from lorakit.reinforcement.rewards import Attempt


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("7", 0.7),
        ("Score: 10/10", 1.0),
        ("<think>3 or 4</think>\n2", 0.2),
        ("great", None),
        ("of 100", None),
    ],
)
def test_marks(reply, mark):
    assert read_mark(reply) == mark


def test_equal_requests_are_asked_once():
    entry = RewardFunction(name="judge", url="http://127.0.0.1:1/v1", model="m")
    asked, notes = [], []
    reward = JudgeReward(entry, None, notes.append)
    reward.ask = lambda turns: asked.append(turns) or "5"
    prompt = [{"role": "user", "content": "Why?"}]
    rows = [Attempt(prompt, text, [], {"answer": "so"}) for text in ("a", "b", "a")]
    assert reward(rows) == [0.5, 0.5, 0.5]
    assert len(asked) == 2
    assert "Why?" in asked[0][1]["content"]
    assert "## Reference answer\nso" in asked[0][1]["content"]
    assert "http://127.0.0.1:1/v1" in notes[0]
