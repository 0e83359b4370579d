"""Rewards of base and tuned model on held-out prompts, for eval.json."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data.conversations import read_conversations
from lorakit.data.dataset import Item, read_validation
from lorakit.data.tokenize.encode import prompt_ids
from lorakit.inference.evaluate import evaluate_loaded
from lorakit.inference.generate import base_answers
from lorakit.model.load import LoadedRun
from lorakit.recipe.schema import Recipe
from lorakit.reinforcement.prompt_schedule import Prompt, prompt_of
from lorakit.reinforcement.rewards import Attempt, RewardSet
from lorakit.reinforcement.rollouts import Sampler, SamplingSettings, uniform_draws
from lorakit.types import Conversation, EvalResult, Sample

# Prompts that are sampled, each once by base and once by tuned, and answers that are shown.
MOST_PROMPTS, SHOWN = 128, 4
# Number of the draws, apart from those of any rollout.
DRAWS = 2**31 - 1


def _note(text: str) -> None:
    """Print a line apart from results, which may be JSON."""
    print(text, file=sys.stderr)


def evaluate_held_out(loaded: LoadedRun, data: str | None, samples: int) -> EvalResult:
    """Score the held-out rows of a run, or `data`: rewards for `grpo`, else losses.

    Raises:
        LorakitError: `data` or a reward function cannot be used.
    """
    recipe, run, tokenizer = loaded.recipe, loaded.run, loaded.tokenizer
    if recipe.objective != "grpo":
        return evaluate_loaded(loaded, data, samples)
    items: Sequence[Item]
    if data is None:
        items = read_validation(run.validation)
    else:
        items = read_conversations([data], recipe, [Path()])[0][:MOST_PROMPTS]
    prompts = [
        prompt_of(item, prompt_ids(tokenizer, item.messages[:-1], item.tools))
        for item in items[:MOST_PROMPTS]
        if isinstance(item, Conversation)
    ]
    rewards = RewardSet(recipe, [Path(), run.path], _note)
    label = data or "the run's held-out prompts"
    return evaluate_rewards(loaded.model, tokenizer, prompts, rewards, recipe, label, samples)


def evaluate_rewards(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    recipe: Recipe,
    label: str,
    shown: int = SHOWN,
) -> EvalResult:
    """Sample a completion of base and tuned for each held-out prompt, and score both.

    Both draw the same numbers, at the temperature of training.

    Args:
        label: name of the data in the result.
    """
    chosen = list(prompts[:MOST_PROMPTS])
    settings = SamplingSettings(
        recipe.max_completion_length, recipe.temperature, recipe.top_p, recipe.top_k
    )
    rows = recipe.examples_per_step
    sampler = Sampler(model, tokenizer, settings, _note, rows, contextlib.nullcontext)
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
    return EvalResult(None, None, label, tuple(samples[:shown]), metrics)
