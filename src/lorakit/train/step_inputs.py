"""Prepared examples as a `datasets.Dataset`, and the inputs of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from lorakit.data.batching import Layout, StepBatch, step_batches
from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import DataError
from lorakit.train.gradient_sync import local_examples
from lorakit.types import Example


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All examples of a step, and those of this rank in micro-batches."""

    own: StepBatch
    examples: list[Example]
    tokens: int
    supervised: int


def as_dataset(examples: Sequence[Example], last_checkpoint: Callable[[], str]) -> Dataset:
    """Serve examples as rows with `input_ids`, `labels` and `origin`, read from disk on access.

    Args:
        last_checkpoint: names the checkpoint to resume from, for the message.

    Raises:
        DataError: on access, if an example cannot be read.
    """

    def read(number: int) -> Example:
        try:
            return examples[number]
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise DataError(
                f"example {number + 1} of the prepared data cannot be read: {error}; "
                f"{last_checkpoint()}",
                hint="check the disk with the cache, then resume with --resume, which prepares "
                "the data again",
            ) from error

    def rows(chosen: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [read(number) for number in chosen["index"]]
        return {name: [getattr(e, name) for e in found] for name in Example.__dataclass_fields__}

    return Dataset.from_dict({"index": list(range(len(examples)))}).with_transform(rows)


def step_inputs(
    rows: Sequence[Mapping[str, Any]], layout: Layout, ranks: DistributedContext
) -> StepInputs:
    """Lay out the rows of a step; see `as_dataset`."""
    examples = [Example(**row) for row in rows]
    return StepInputs(
        step_batches(local_examples(examples, ranks), layout),
        examples,
        sum(len(e.input_ids) for e in examples),
        sum(e.trained_tokens for e in examples),
    )
