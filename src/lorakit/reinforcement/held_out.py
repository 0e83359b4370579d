"""Rewards of base and tuned model on held-out prompts, for eval.json."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

from lorakit.inference.generate import base_answers
from lorakit.recipe.schema import Recipe
from lorakit.reinforcement.prompt_schedule import PromptRows
from lorakit.reinforcement.rewards import Attempt, RewardSet
from lorakit.reinforcement.rollouts import Sampler, SamplingSettings, uniform_draws
from lorakit.types import EvalResult, Sample

# Prompts that are sampled, each once by base and once by tuned, and answers that are shown.
MOST_PROMPTS, SHOWN = 128, 4
# Number of the draws, apart from those of any rollout.
DRAWS = 2**31 - 1


def evaluate_rewards(
    model: Any,
    tokenizer: Any,
    prompts: PromptRows,
    rewards: RewardSet,
    recipe: Recipe,
    label: str,
) -> EvalResult:
    """Sample a completion of base and tuned for each held-out prompt, and score both.

    Both draw the same numbers, at the temperature of training.

    Args:
        label: name of the data in the result.
    """
    chosen = list(itertools.islice(iter(prompts), MOST_PROMPTS))
    settings = SamplingSettings(
        recipe.max_completion_length, recipe.temperature, recipe.top_p, recipe.top_k
    )
    rows = recipe.examples_per_step
    sampler = Sampler(model, tokenizer, settings, print, rows, contextlib.nullcontext)
    draws = uniform_draws(recipe.seed, DRAWS, len(chosen), recipe.max_completion_length)

    def scored() -> tuple[list[str], dict[str, float]]:
        completions = sampler.sample([p.ids for p in chosen], draws)
        texts = [tokenizer.decode(c.ids, skip_special_tokens=True).strip() for c in completions]
        found = rewards.score(
            [
                Attempt(p.turns, text, c.ids, p.fields)
                for p, text, c in zip(chosen, texts, completions, strict=True)
            ]
        )
        means = {"reward": float(np.nanmean(found.total))}
        for column, name in enumerate(rewards.names):
            values = found.parts[:, column]
            if not np.isnan(values).all():
                means[f"reward {name}"] = float(np.nanmean(values))
        return texts, means

    tuned_texts, tuned = scored()
    with base_answers(model):
        base_texts, base = scored()
    samples = [
        Sample(str(p.turns[-1]["content"]), str(p.fields.get("answer", "")), b, t)
        for p, b, t in zip(chosen, base_texts, tuned_texts, strict=True)
    ]
    metrics = {
        name: {"base": base[name], "tuned": tuned[name], "rows": len(chosen)}
        for name in tuned
        if name in base
    }
    return EvalResult(None, None, label, tuple(samples[:SHOWN]), metrics)
