"""All completions of a step with rewards and advantages, and the examples that train on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lorakit.recipe.schema import Recipe
from lorakit.reinforcement.advantages import GroupScores, group_scores
from lorakit.reinforcement.policy_loss import (
    ADVANTAGE,
    COMPLETION,
    OLD,
    REFERENCE,
    SAMPLER,
    WEIGHT,
    token_weights,
)
from lorakit.reinforcement.rollouts import Completion
from lorakit.types import IGNORE, Origin, ScoredExample


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """A completion of a prompt with its reward, and the reward of each function.

    `old_log_p` and `reference_log_p` are those of the trainer at the rollout and of the reference,
    where the loss needs them.
    """

    prompt_ids: list[int]
    origin: Origin
    completion: Completion
    text: str
    reward: float
    parts: list[float]
    old_log_p: list[float] = field(default_factory=list)
    reference_log_p: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScoredCompletion:
        """Restore the record of `as_dict`."""
        origin, completion = Origin(**values["origin"]), Completion(**values["completion"])
        return cls(**{**values, "origin": origin, "completion": completion})


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The completions of a rollout, the groups of its prompts one after the other."""

    number: int
    completions: list[ScoredCompletion]
    scores: GroupScores

    @classmethod
    def of(cls, number: int, completions: list[ScoredCompletion], recipe: Recipe) -> RolloutBatch:
        """Compute the advantages of a rollout."""
        rewards = np.array([c.reward for c in completions], np.float64)
        groups = rewards.reshape(-1, recipe.num_generations)
        return cls(number, completions, group_scores(groups, recipe.scale_rewards))

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and completions."""
        return sum(len(c.prompt_ids) + len(c.completion.ids) for c in self.completions)

    @property
    def advantages(self) -> list[float]:
        """Advantage of each completion."""
        return [float(value) for value in self.scores.advantages.ravel()]


def plain_example(prompt: Sequence[int], completion: Completion, origin: Origin) -> ScoredExample:
    """The ids of a prompt and its completion, of which the completion is trained."""
    labels = [IGNORE] * len(prompt) + completion.ids
    return ScoredExample([*prompt, *completion.ids], labels, origin, token_values={})


def numbered(examples: Sequence[ScoredExample]) -> list[ScoredExample]:
    """The same examples, each token with the number of its example."""
    return [
        ScoredExample(
            e.input_ids, e.labels, e.origin,
            token_values={COMPLETION: [float(i)] * e.trained_tokens},
        )
        for i, e in enumerate(examples)
    ]  # fmt: skip


def training_examples(
    batch: RolloutBatch, recipe: Recipe, at_least: int = 1
) -> list[ScoredExample]:
    """Examples of a rollout with the numbers that the loss needs.

    Completions without influence on the gradient are left out: those that were cut, if the recipe
    masks them, and without a KL term those with advantage 0. The weights count them as TRL does.

    Args:
        at_least: number of examples, of which the last ones may have weight 0.
    """
    masked = recipe.mask_truncated_completions
    completions = [c.completion for c in batch.completions]
    counted = [not (masked and c.truncated) for c in completions]
    lengths = [len(c.ids) for c in completions]
    weights = token_weights(recipe.loss_type, lengths, counted, recipe.max_completion_length)
    rows = zip(batch.completions, batch.advantages, weights, counted, itertools.count())
    examples: list[ScoredExample] = []
    spare: list[ScoredExample] = []
    for scored, advantage, weight, kept, number in rows:
        used = kept and (advantage != 0 or recipe.beta_value > 0)
        weight = weight if used else 0.0
        tokens = len(scored.completion.ids)
        values = {
            ADVANTAGE: [advantage] * tokens,
            WEIGHT: [weight] * tokens,
            COMPLETION: [float(number)] * tokens,
            SAMPLER: scored.completion.log_probs,
        }
        if scored.old_log_p:
            values[OLD] = scored.old_log_p
        if scored.reference_log_p:
            values[REFERENCE] = scored.reference_log_p
        plain = plain_example(scored.prompt_ids, scored.completion, scored.origin)
        example = ScoredExample(plain.input_ids, plain.labels, plain.origin, token_values=values)
        (examples if used else spare).append(example)
    spare.sort(key=lambda example: len(example.input_ids))
    return examples + spare[: max(0, at_least - len(examples))]
