"""Examples enter; the tensors of micro-batches leave: padded rows, or documents packed in one row.

Shapes: B rows, T tokens of the longest, N supervised tokens of the micro-batch. `positions` [N]
are the places in the flattened [B*T] rows whose hidden state predicts `targets` [N]; both are made
here, on the host, so that the loss needs no look back at the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.data.pack import best_fit
from lorakit.records import IGNORE, Example

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the examples of one optimizer step become micro-batches.

    `rows` examples at most in a padded micro-batch; packed ones hold `capacity` tokens at most.
    """

    pad_id: int
    rows: int
    capacity: int
    packed: bool


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The micro-batches of one optimizer step, on the host, and how many tokens they hold.

    `examples` and `layout` are what they were made of: to lay the step out anew, and to name rows.
    """

    micro: list[Batch]
    tokens: int
    supervised: int
    examples: tuple[Example, ...]
    layout: Layout


def step_batches(examples: Sequence[Example], layout: Layout) -> StepBatch:
    """Lay out the examples of one optimizer step."""
    if layout.packed:
        groups = best_fit([len(e.input_ids) for e in examples], layout.capacity)
        micro = [pack([examples[i] for i in group]) for group in groups]
    else:
        starts = range(0, len(examples), layout.rows)
        micro = [collate(examples[i : i + layout.rows], layout.pad_id) for i in starts]
    tokens = sum(len(e.input_ids) for e in examples)
    supervised = sum(e.trained_tokens for e in examples)
    return StepBatch(micro, tokens, supervised, tuple(examples), layout)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """`input_ids` int64 [B, T] padded on the right, `positions`, `targets`.

    `attention_mask` [B, T] comes along only where there is padding. That carries no target, by its
    place: a pad id that is also the end-of-turn id (SmolLM2 and Llama-2 are often set up so) stays
    trained where it ends an answer.
    """
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
    batch = {"input_ids": input_ids, **_supervised(examples, [width] * len(examples))}
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    if int(lengths.min()) < width:
        batch["attention_mask"] = (torch.arange(width) < lengths.unsqueeze(1)).long()
    return batch


def pack(examples: Sequence[Example]) -> Batch:
    """Documents one after another in one row [1, T], or as rows where all are of one length.

    `position_ids` start anew with each document; `lengths` and `borders` (cumulative, int32) say
    where they end.
    """
    lengths = [len(example.input_ids) for example in examples]
    if len(set(lengths)) == 1:
        return collate(examples, 0)
    batch = _supervised(examples, lengths)
    batch["input_ids"] = torch.tensor([[t for e in examples for t in e.input_ids]])
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    batch["borders"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch["lengths"] = tuple(lengths)
    return batch


def _supervised(examples: Sequence[Example], widths: Sequence[int]) -> Batch:
    """Where the hidden states stand that predict a trained token, and these tokens."""
    positions, targets, start = [], [], 0
    for example, width in zip(examples, widths, strict=True):
        labels = torch.tensor(example.labels)
        # labels[t] is the id at t; position t - 1 predicts it.
        trained = (labels[1:] != IGNORE).nonzero().squeeze(1)
        positions.append(trained + start)
        targets.append(labels[1:][trained])
        start += width
    return {"positions": torch.cat(positions), "targets": torch.cat(targets)}
