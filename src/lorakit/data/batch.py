"""Examples enter; padded tensors leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.records import IGNORE, Example


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    width = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORE)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for i, e in enumerate(examples):
        n = len(e.input_ids)
        ids[i, :n] = torch.tensor(e.input_ids)
        labels[i, :n] = torch.tensor(e.labels)
        mask[i, :n] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
