"""Compute the losses of preference objectives, as TRL defines them.

With l the log-probability of an answer under the model, r that under the reference, n its tokens,
and c, w for the chosen and the rejected answer of a pair:

    dpo     -log sigmoid(b d)                      d = (l_c - r_c) - (l_w - r_w)
    ipo     (m_c - m_w - 1 / (2 b))^2              m = (l - r) / n
    simpo   -log sigmoid(b (l_c/n_c - l_w/n_w) - g)
    orpo    -l_c (mean over tokens) - b log sigmoid(o_c - o_w)    o = l/n - log(1 - exp(l/n))
    kto     g (1 - sigmoid(b (l - r - kl)))        good answers; g is their weight
            g (1 - sigmoid(b (kl - l + r)))        bad answers

The loss of a step is the mean over its pairs (or answers), however they are divided into
micro-batches; the likelihood term of ORPO is the mean over the tokens of the chosen answers. ORPO
trains answers only, where TRL trains their prompts too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorakit.data.batching import Batch
from lorakit.recipe.schema import PREFERENCE_OBJECTIVES, REFERENCE_OBJECTIVES, Recipe
from lorakit.types import Example

# Sums over a micro-batch, in this order.
SUMS = (
    "chosen",
    "rejected",
    "reward_chosen",
    "reward_rejected",
    "logp_chosen",
    "logp_rejected",
    "correct",
)


@dataclass(frozen=True, slots=True)
class Answers:
    """Log-probabilities of answers and what they are compared with, float32 [S].

    Of a pair the chosen answer comes first. `good` is 1 or 0 for KTO, None for pairs.
    """

    logps: Tensor
    counts: Tensor
    reference: Tensor
    good: Tensor | None = None


class PreferenceObjective:
    """Loss of `objective` from the losses of tokens.

    Attributes:
        kl: estimate of the divergence for KTO, set before a step.
        token_weight: pairs of a step divided by the tokens of its chosen answers, for ORPO.
    """

    inputs = frozenset({"sequence", "counts", "reference", "good"})
    metrics = len(SUMS)

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.name, self.beta, self.recipe = recipe.objective, recipe.beta_value, recipe
        self.kl = torch.zeros((), device=device)
        self.token_weight = torch.zeros((), device=device)

    @property
    def needs_reference(self) -> bool:
        """True if the loss compares with the reference model."""
        return self.name in REFERENCE_OBJECTIVES

    def begin(self, examples: Sequence[Example]) -> None:
        """Set the values that depend on all examples of a step."""
        if self.name == "orpo":
            tokens = sum(example.sequences[0].trained_tokens for example in examples)
            self.token_weight.fill_(len(examples) / max(1, tokens))

    def __call__(self, token_losses: Tensor, micro: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of a micro-batch, and SUMS; see `TokenObjective`."""
        counts = micro["counts"]
        numbers = torch.arange(len(counts), device=token_losses.device)
        # A product with 0 and 1: sums in a fixed order, without synchronization.
        member = (micro["sequence"] == numbers.unsqueeze(1)).float()
        logps = -(member * token_losses).sum(1)
        answers = Answers(logps, counts, micro["reference"], micro.get("good"))
        return self.losses(answers).sum(), self.sums(answers)

    def losses(self, answers: Answers) -> Tensor:
        """Loss of each pair, or of each answer for KTO."""
        if answers.good is not None:
            return self._kto(answers, answers.good)
        log_ratios = answers.logps - answers.reference
        if self.name == "dpo":
            chosen, rejected = _sides(log_ratios)
            return -logsigmoid(self.beta * (chosen - rejected))
        if self.name == "ipo":
            chosen, rejected = _sides(log_ratios / answers.counts)
            return (chosen - rejected - 1 / (2 * self.beta)) ** 2
        chosen, rejected = _sides(answers.logps / answers.counts)
        if self.name == "simpo":
            return -logsigmoid(self.beta * (chosen - rejected) - self.recipe.simpo_gamma)
        odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        likelihood = -_sides(answers.logps)[0] * self.token_weight
        return likelihood - self.beta * logsigmoid(odds)

    def _kto(self, answers: Answers, good: Tensor) -> Tensor:
        distance = answers.logps - answers.reference - self.kl
        weight = torch.where(good > 0, self.recipe.desirable_weight, self.recipe.undesirable_weight)
        return weight * (1 - torch.sigmoid(self.beta * torch.where(good > 0, distance, -distance)))

    @torch.no_grad()
    def sums(self, answers: Answers) -> Tensor:
        """SUMS over the answers, float32 [7]."""
        logps = answers.logps
        if self.name in ("simpo", "orpo"):  # without reference, by token
            logps = logps / answers.counts
        rewards = self.beta * (logps - answers.reference)
        if answers.good is not None:
            good = answers.good
            sums = [x for v in (rewards, logps) for x in ((v * good).sum(), (v * (1 - good)).sum())]
            counts = [good.sum(), (1 - good).sum()]
            return torch.stack([*counts, *sums, torch.zeros_like(counts[0])])
        chosen, rejected = _sides(rewards)
        pairs = torch.ones_like(chosen).sum()
        correct = (chosen > rejected).float().sum()
        sums = [side.sum() for side in (chosen, rejected, *_sides(logps))]
        return torch.stack([pairs, pairs, *sums, correct])


def metrics_of(sums: Sequence[float], paired: bool) -> dict[str, float]:
    """Metrics with TRL's names from SUMS of a step or of a data set."""
    found = dict(zip(SUMS, sums, strict=True))
    metrics = {}
    for side in ("chosen", "rejected"):
        if found[side]:
            metrics[f"rewards/{side}"] = found[f"reward_{side}"] / found[side]
            metrics[f"logps/{side}"] = found[f"logp_{side}"] / found[side]
    if found["chosen"] and found["rejected"]:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if paired and found["chosen"]:
        metrics["rewards/accuracies"] = found["correct"] / found["chosen"]
    return metrics


def objective_of(recipe: Recipe, device: torch.device) -> PreferenceObjective | None:
    """The objective of a recipe; None for supervised fine-tuning."""
    preferring = recipe.objective in PREFERENCE_OBJECTIVES
    return PreferenceObjective(recipe, device) if preferring else None


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected answers."""
    pairs = values.view(len(values) // 2, 2)
    return pairs[:, 0], pairs[:, 1]


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate on both sides of -log 2 (Maechler 2012)."""
    near = x > -math.log(2)
    # `where` before the logarithm too: an infinite branch would make the gradient NaN.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0).clamp(max=-1e-7)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
