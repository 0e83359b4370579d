"""Examples enter; padded tensors leave. Shapes: B batch, T tokens of the longest example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.records import IGNORE, Example


def collate(
    examples: Sequence[Example], pad_id: int, pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """`input_ids`, `labels` and `attention_mask`, each int64 [B, T], padded on the right.

    Padding is masked by position: a pad id that is also the end-of-turn id (SmolLM2 and Llama-2 are
    often set up so) stays trained where it ends an answer.

    Args:
        pad_to_multiple_of: round T up to a multiple, for kernels that like 8 or 64.
    """
    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(examples), width)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        input_ids[row, :size] = torch.tensor(example.input_ids)
        labels[row, :size] = torch.tensor(example.labels)
        mask[row, :size] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
