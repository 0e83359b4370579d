"""Rewards of held-out prompts: draws are fixed, base and tuned use the same ones."""

import contextlib

from lorakit.recipe.schema import Recipe
from lorakit.reinforcement import held_out
from lorakit.reinforcement.held_out import evaluate_rewards
from lorakit.reinforcement.prompt_schedule import Prompt
from lorakit.reinforcement.rewards import RewardSet
from lorakit.reinforcement.rollouts import Completion
from lorakit.types import Origin

RECIPE = Recipe.model_validate(
    {"model": "demo", "data": "d", "objective": "grpo", "reward_funcs": ["exact_answer"]}
)


def test_base_and_tuned_answer_the_same_prompts_with_the_same_draws(monkeypatch):
    state, seen = {"side": "tuned"}, []

    class Fixed:
        def __init__(self, *args):
            pass

        def sample(self, prompts, draws):
            seen.append(draws)
            ids = {"tuned": [1], "base": [2]}[state["side"]]
            return [Completion(ids, [0.0], 0.0, False) for _ in prompts]

    @contextlib.contextmanager
    def as_base(model):
        state["side"] = "base"
        yield

    monkeypatch.setattr(held_out, "Sampler", Fixed)
    monkeypatch.setattr(held_out, "base_answers", as_base)

    class Words:
        def decode(self, ids, skip_special_tokens):
            return {1: "right", 2: "wrong"}[ids[0]]

    turns = [{"role": "user", "content": "Q"}]
    prompts = [Prompt(turns, [5], {"answer": "right"}, Origin("d", i)) for i in range(3)]
    rewards = RewardSet(RECIPE, [], print)
    result = evaluate_rewards(None, Words(), prompts, rewards, RECIPE, "held out", shown=2)
    assert result.metrics["reward"] == {"base": 0.0, "tuned": 1.0, "rows": 3}
    assert result.metrics["reward exact_answer"]["tuned"] == 1.0
    assert [(s.base, s.tuned, s.reference) for s in result.samples] == [
        ("wrong", "right", "right")
    ] * 2
    assert result.base is None
    assert (seen[0] == seen[1]).all()
