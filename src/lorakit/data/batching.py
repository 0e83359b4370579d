"""Examples enter; the tensors of micro-batches leave: padded rows, or documents packed in one row.

Shapes: B rows, T tokens of the longest, N supervised tokens of the micro-batch. `positions` [N]
are the places in the flattened [B*T] rows whose hidden state predicts `targets` [N]; both are made
here, on the host, so that the loss needs no look back at the device.

Lengths and a capacity enter; groups leave that fill micro-batches without padding.

Packing changes how the examples of one optimizer step are laid out, never which they are: the step
has the recipe's number of examples, their tokens go through the model in as few micro-batches as
hold them, and each document sees only itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorakit.types import IGNORE, Example

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


# On a CPU packed documents cost an attention call each: 0.99 s a demo step against 0.92 s.
PAYS_ABOVE = 0.1


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices, each at most `capacity` tokens together: best-fit decreasing.

    Each group goes where the least room is left. A length over `capacity` gets a group of its own.
    The same lengths always give the same groups.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[index]
        fits = [(left, g) for g, left in enumerate(room) if left >= size]
        if fits:
            left, group = min(fits)
            groups[group].append(index)
            room[group] = left - size
        else:
            groups.append([index])
            room.append(capacity - size)
    return groups


def saved_share(
    lengths: Sequence[int] | NDArray[np.int64], rows: int, seed: int | None = None
) -> float:
    """Share of tokens that would be padding in micro-batches of `rows` examples.

    Args:
        seed: of a random order, as training has it; None for the order given.
    """
    order = np.asarray(lengths, np.int64)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    if not len(order):
        return 0.0
    missing = -len(order) % rows
    widths = np.pad(order, (0, missing)).reshape(-1, rows).max(axis=1)
    padded = int(widths.sum()) * rows - int(widths[-1]) * missing
    return 1 - int(order.sum()) / padded


def packing_words(share: float, wanted: bool, cpu: bool) -> tuple[bool, str]:
    """Whether a run packs where `share` would be padding, and the reason in words."""
    if not wanted:
        return False, "off (packing: false)"
    if cpu and share <= PAYS_ABOVE:
        return False, (
            f"off: {share:.0%} would be padding, and on a CPU packing pays above {PAYS_ABOVE:.0%}"
        )
    return True, f"on: documents share micro-batches; side by side {share:.0%} would be padding"
