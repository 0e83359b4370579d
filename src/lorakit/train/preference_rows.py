"""Rows of preference data as a trainer reads them: with reference values and mismatched answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lorakit.data.dataset import as_dataset, to_example
from lorakit.errors import DataError
from lorakit.types import IGNORE, Example


class PreferenceRows(Sequence[Example]):
    """Examples with two sequences, read on access.

    A row of KTO gets a second sequence: its prompt, followed by the answer of a row with another
    prompt. Held-out rows may all have one prompt: then it is their own answer.

    Attributes:
        reference: log-probabilities of both sequences, float32 [N, 2]; None until they are set.
    """

    def __init__(self, examples: Sequence[Example], mismatch: bool, held_out: bool = False) -> None:
        self.rows = as_dataset(examples)
        self.partners = mismatched(self.rows, held_out) if mismatch else None
        self.reference: NDArray[np.float32] | None = None

    def row(self, index: int) -> dict[str, Any]:
        """The values of one row, for `to_example`."""
        row = dict(self.rows[index])
        if self.partners is not None:
            row |= with_answer_of(row, self.rows[int(self.partners[index])])
        if self.reference is not None:
            row["reference"] = self.reference[index].tolist()
        return row

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return to_example(self.row(index))


class TrainerRows:
    """`PreferenceRows` as a map-style dataset of torch, whose items are dictionaries."""

    def __init__(self, rows: PreferenceRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows.row(index)


def with_answer_of(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `row` with a second sequence: its prompt, and the answer of `other`."""
    ids, labels = row["input_ids"], row["labels"]
    start, answer = _answer_start(labels), _answer_start(other["labels"])
    return {
        "input_ids": ids + ids[:start] + other["input_ids"][answer:],
        "labels": labels + [IGNORE] * start + other["labels"][answer:],
        "second": len(ids),
    }


def mismatched(rows: Dataset, held_out: bool = False) -> NDArray[np.int64]:
    """Nearest row with another prompt before each row, int64 [N]; the first row counts back from
    the end.

    TRL rotates the answers of a batch by one. Rows of one prompt often follow each other: the
    answer of the row before would be an answer to the same prompt.

    Raises:
        DataError: all rows have the same prompt.
    """
    prompts = [_prompt_of(row) for row in rows]
    others = (i for i in range(len(prompts) - 1, -1, -1) if prompts[i] != prompts[0])
    last = next(others, None)
    if last is None and held_out:
        return np.arange(len(prompts))
    if last is None:
        raise DataError(
            f"objective: kto needs answers to at least two prompts (found: {len(rows)} rows of one "
            "prompt)",
            hint="add rows with other prompts, or set objective: dpo if the rows are pairs",
        )
    partners = np.full(len(prompts), last, np.int64)
    for index in range(1, len(prompts)):
        same = prompts[index] == prompts[index - 1]
        partners[index] = partners[index - 1] if same else index - 1
    return partners


def _prompt_of(row: Mapping[str, Any]) -> bytes:
    prompt = np.asarray(row["input_ids"][: _answer_start(row["labels"])], np.int32)
    return hashlib.sha256(prompt.tobytes()).digest()


def _answer_start(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
