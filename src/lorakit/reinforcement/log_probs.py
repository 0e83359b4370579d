"""Log-probabilities of completions by the trainer's own forward, without gradients.

The reference of the KL term is the model with the trained parameters of the start: the base for a
new adapter (its product is zero), or the adapter that training starts from.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.batching import Batch, Layout, StepBatch, step_batches
from lorakit.errors import WorkError
from lorakit.model.eval_mode import evaluating
from lorakit.reinforcement.policy_loss import COMPLETION
from lorakit.reinforcement.rollout_batch import numbered
from lorakit.train.oom import halve_micro_batches, run_catching_oom
from lorakit.types import ScoredExample

# A micro-batch on the device -> log p of its targets, float32 [N].
LogProbs = Callable[[Batch], Tensor]


class ReferenceWeights:
    """The trained parameters as they are now, to compute with them later."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.start = [p.detach().clone() for p in parameters]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put the values of the start into the parameters, and the present ones back on exit."""
        present = [p.detach().clone() for p in self.parameters]
        self._fill(self.start)
        try:
            yield
        finally:
            self._fill(present)

    def _fill(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def completion_log_probs(
    model: Any,
    examples: Sequence[ScoredExample],
    layout: Layout,
    log_probs: LogProbs,
) -> list[list[float]]:
    """Log p of the trained tokens of each example, in order, without dropout.

    If memory runs out, micro-batches are halved.

    Raises:
        WorkError: one example alone does not fit into memory.
    """
    step = step_batches(numbered(examples), layout)
    with evaluating(model):
        while True:
            found, fault = run_catching_oom(functools.partial(_all, step, log_probs))
            if found is not None:
                return found
            smaller = halve_micro_batches(step)
            if smaller is None:
                longest = max(len(e.input_ids) for e in examples)
                raise WorkError(
                    f"out of memory computing log-probabilities of {longest} tokens: {fault}",
                    hint="lower max_completion_length or cutoff_len",
                )
            step = smaller


def _all(step: StepBatch, log_probs: LogProbs) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in step.examples]
    for micro in step.micro:
        owners = micro[COMPLETION].long().tolist()
        values = log_probs({k: v for k, v in micro.items() if k != COMPLETION}).tolist()
        for owner, value in zip(owners, values, strict=True):
            found[owner].append(value)
    return found
