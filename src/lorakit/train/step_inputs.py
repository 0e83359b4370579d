"""Inputs of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.batching import Layout, StepBatch, step_batches
from lorakit.data.dataset import to_example
from lorakit.distributed.process_group import DistributedContext
from lorakit.train.gradient_sync import local_examples
from lorakit.types import Example


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All examples of a step, and those of this rank in micro-batches."""

    own: StepBatch
    examples: list[Example]
    tokens: int
    supervised: int


def step_inputs(
    rows: Sequence[Mapping[str, Any]], layout: Layout, ranks: DistributedContext
) -> StepInputs:
    """Lay out the rows of a step, read from the training dataset."""
    examples = [to_example(row) for row in rows]
    return StepInputs(
        step_batches(local_examples(examples, ranks), layout),
        examples,
        sum(len(e.input_ids) for e in examples),
        sum(e.trained_tokens for e in examples),
    )
