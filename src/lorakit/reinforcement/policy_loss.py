"""GRPO's loss of a micro-batch from the log-probabilities of its tokens.

    ratio = p / p_old                                       p_old: the trainer's p at the rollout
    l     = -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) c + beta kl
    kl    = p_ref / p - log(p_ref / p) - 1                  (times ratio: use_bias_correction_kl)
    loss  = sum_t w_t l_t                                   w: `token_weights`

c corrects the difference between the program that sampled and the trainer: p_old / p_sampler, per
token or as a product over the completion, bounded. Names and defaults are those of TRL's
GRPOConfig.

The weights are constants of the step, so the sum over micro-batches and ranks does not depend on
how completions were divided.

Shapes: N completion tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.data.batching import Batch
from lorakit.recipe.schema import Recipe

# Names of `ScoredExample.token_values`.
ADVANTAGE, WEIGHT, COMPLETION, SAMPLER, OLD, REFERENCE = VALUES = (
    "token_advantage",
    "token_weight",
    "token_completion",
    "token_sampler_log_p",
    "token_old_log_p",
    "token_reference_log_p",
)
# Sums over tokens that a loss returns, in this order.
SUMS = ("tokens", "kl", "clipped_low", "clipped_high", "sampler_difference", "corrected_away")


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Settings of the loss, see `recipe/schema.py`; `completions`: most of a step."""

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    bias_correction_kl: bool = True
    correction: str = "sequence_mask"
    correction_max: float = 3.0
    completions: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> PolicySettings:
        """Take the settings from a recipe."""
        high = recipe.epsilon if recipe.epsilon_high is None else recipe.epsilon_high
        return cls(
            recipe.loss_type,
            recipe.epsilon,
            high,
            recipe.beta_value,
            recipe.use_bias_correction_kl,
            recipe.importance_sampling_mode,
            recipe.importance_sampling_clip_max,
            recipe.examples_per_step,
        )


def token_weights(
    loss_type: str, lengths: Sequence[int], counted: Sequence[bool], longest: int
) -> list[float]:
    """Weight of the tokens of each completion of a step.

    Args:
        lengths: tokens of all completions of the step.
        counted: false for completions that are left out of the loss.
        longest: `max_completion_length`.
    """
    count = len(lengths)
    if loss_type == "grpo":
        return [1 / (count * max(1, length)) for length in lengths]
    if loss_type == "dr_grpo":
        return [1 / (count * longest)] * count
    # "bnpo" divides by the tokens of a batch: a step is one batch here.
    tokens = sum(length for length, kept in zip(lengths, counted, strict=True) if kept)
    return [1 / max(1, tokens)] * count


def policy_loss(
    log_p: Tensor, values: Mapping[str, Tensor], settings: PolicySettings
) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch, and `SUMS` over its tokens.

    Args:
        log_p: log-probability of each token under the present adapter, float32 [N].
        values: `ADVANTAGE`, `WEIGHT` (0 for padding), `COMPLETION` (its number in the step) and
            `SAMPLER`; `OLD` if the adapter has changed since the rollout; `REFERENCE` with `beta`.
            Each [N].
    """
    old = values[OLD] if OLD in values else log_p.detach()
    advantage, ratio = values[ADVANTAGE], torch.exp(log_p - old)
    low, high = 1 - settings.epsilon, 1 + settings.epsilon_high
    losses = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    difference = old - values[SAMPLER]
    correction = sampler_correction(difference, values[COMPLETION], settings)
    losses = losses * correction
    kl = torch.zeros_like(log_p)
    if settings.beta:
        behind = values[REFERENCE] - log_p
        kl = torch.exp(behind) - behind - 1
        kl = kl * ratio if settings.bias_correction_kl else kl
        losses = losses + settings.beta * kl
    loss = (losses * values[WEIGHT]).sum()
    with torch.no_grad():
        counted = (values[WEIGHT] != 0).float()
        columns = (
            torch.ones_like(kl),
            kl,
            ((ratio < low) & (advantage < 0)).float(),
            ((ratio > high) & (advantage > 0)).float(),
            difference.abs(),
            (correction == 0).float(),
        )
        sums = torch.stack([(column * counted).sum() for column in columns])
    return loss, sums


class PolicyObjective:
    """`policy_loss` as a `TokenObjective`."""

    metrics = len(SUMS)

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.inputs = frozenset(VALUES)

    def __call__(self, token_losses: Tensor, micro: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch from -log p of its tokens, and `SUMS`."""
        return policy_loss(-token_losses, micro, self.settings)


def sampler_correction(difference: Tensor, owner: Tensor, settings: PolicySettings) -> Tensor:
    """Factor of each token: the bounded ratio of the trainer's p to the sampler's, [N].

    Args:
        difference: log p of the trainer minus that of the sampler [N].
        owner: number of each token's completion [N], below `completions`.
    """
    if settings.correction.startswith("sequence"):
        index = owner.long()
        total = difference.new_zeros(settings.completions).index_add(0, index, difference)
        difference = total[index]
    ratio = torch.exp(difference)
    if settings.correction.endswith("truncate"):
        return ratio.clamp(max=settings.correction_max)
    return ratio.masked_fill(ratio > settings.correction_max, 0.0)
