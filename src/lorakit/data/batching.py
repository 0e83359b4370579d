"""Collate examples into padded or packed micro-batches.

Shapes: B rows, T tokens of the longest, N supervised tokens of the micro-batch. `positions` [N]
are the indices into the flattened [B*T] rows whose hidden state predicts `targets` [N]; both are
computed here, on the host, so that the loss does not synchronize with the device.

Packing changes the layout of the examples of an optimizer step, not their choice: the step has the
recipe's number of examples, in as few micro-batches as hold their tokens, and each document attends
only to itself. The two sequences of a preference pair are documents of one micro-batch; such a
micro-batch also says which sequence each target belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorakit.types import IGNORE, Example, ScoredExample

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of the micro-batches of an optimizer step.

    A padded micro-batch has at most `rows` examples, a packed one at most `capacity` tokens.
    """

    pad_id: int
    rows: int
    capacity: int
    packed: bool


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The micro-batches of one optimizer step, on the host, with their token counts.

    `examples` and `layout` are kept to lay the step out again, and to name rows.
    """

    micro: list[Batch]
    tokens: int
    supervised: int
    examples: tuple[Example, ...]
    layout: Layout


def step_batches(examples: Sequence[Example], layout: Layout) -> StepBatch:
    """Lay out the examples of one optimizer step."""
    if layout.packed:
        groups = best_fit([tokens_of(e) for e in examples], layout.capacity)
        micro = [lay_out([examples[i] for i in group], layout) for group in groups]
    else:
        starts = range(0, len(examples), layout.rows)
        micro = [lay_out(examples[i : i + layout.rows], layout) for i in starts]
    tokens = sum(len(e.input_ids) for e in examples)
    supervised = sum(e.trained_tokens for e in examples)
    return StepBatch(micro, tokens, supervised, tuple(examples), layout)


def lay_out(examples: Sequence[Example], layout: Layout) -> Batch:
    """Collate or pack the sequences of a few examples; those of a pair follow one another.

    Returns:
        As `collate` or `pack`. For preference data also `sequence` int64 [N], the sequence of each
        target; `counts` float32 [S], the targets of each sequence; `reference` float32 [S]; and for
        KTO `good` float32 [S].
    """
    sequences = [s for e in examples for s in trained_sequences(e)]
    batch = pack(sequences) if layout.packed else collate(sequences, layout.pad_id)
    if any(example.second or example.good is not None for example in examples):
        # Position t - 1 predicts token t: the first label of a sequence is never a target.
        counts = torch.tensor([s.trained_tokens for s in sequences])
        batch["sequence"] = torch.repeat_interleave(torch.arange(len(sequences)), counts)
        batch["counts"] = counts.float()
        reference = [r for e in examples for r in _reference(e)]
        batch["reference"] = torch.tensor(reference, dtype=torch.float32)
    if any(example.good is not None for example in examples):
        batch["good"] = torch.tensor([float(bool(e.good)) for e in examples])
    return batch


def trained_sequences(example: Example) -> tuple[Example, ...]:
    """The sequences that go through a step: both of a pair, the first one of KTO's."""
    return example.sequences if example.good is None else example.sequences[:1]


def tokens_of(example: Example) -> int:
    """Tokens of an example in a micro-batch."""
    return len(example.input_ids) if example.good is None else len(example.sequences[0].input_ids)


def _reference(example: Example) -> tuple[float, ...]:
    count = len(trained_sequences(example))
    return (example.reference or (0.0, 0.0))[:count]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Collate examples into rows padded on the right.

    Returns:
        `input_ids` int64 [B, T], `positions`, `targets`, and `attention_mask` [B, T] only if there
        is padding. Padding is masked by position, not by id: a pad id that is also the end-of-turn
        id (SmolLM2 and Llama-2 are often set up so) stays trained where it ends an answer.
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
    """Pack documents into one row [1, T], or collate them as rows if all have the same length.

    Returns:
        As `collate`; a packed batch also has `position_ids` that restart at each document, and
        `lengths` and `borders` (cumulative lengths, int32), which mark where the documents end.
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
    """Positions of the hidden states that predict supervised tokens, and these tokens."""
    positions, targets, start = [], [], 0
    for example, width in zip(examples, widths, strict=True):
        labels = torch.tensor(example.labels)
        # labels[t] is the id at t; position t - 1 predicts it.
        trained = (labels[1:] != IGNORE).nonzero().squeeze(1)
        positions.append(trained + start)
        targets.append(labels[1:][trained])
        start += width
    batch: Batch = {"positions": torch.cat(positions), "targets": torch.cat(targets)}
    scored = [e.token_values for e in examples if isinstance(e, ScoredExample)]
    for name in scored[0] if scored else ():
        batch[name] = torch.tensor([v for values in scored for v in values[name]])
    return batch


# On a CPU packed documents cost an attention call each: 0.99 s a demo step against 0.92 s.
PAYS_ABOVE = 0.1


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices into bins of at most `capacity` tokens with best-fit decreasing.

    Each length goes into the group with the least free space that fits it. A length over `capacity`
    gets its own group. The result is deterministic.
    """
    groups: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[index]
        fits = [(left, g) for g, left in enumerate(free) if left >= size]
        if fits:
            left, group = min(fits)
            groups[group].append(index)
            free[group] = left - size
        else:
            groups.append([index])
            free.append(capacity - size)
    return groups


def saved_share(
    lengths: Sequence[int] | NDArray[np.int64], rows: int, seed: int | None = None
) -> float:
    """Share of tokens that would be padding in micro-batches of `rows` examples.

    Args:
        seed: seed of a random order, as in training; None keeps the given order.
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


def decide_packing(share: float, wanted: bool, cpu: bool) -> tuple[bool, str]:
    """Decide whether a run packs if `share` of its tokens would be padding, with the reason."""
    if not wanted:
        return False, "off (packing: false)"
    if cpu and share <= PAYS_ABOVE:
        return False, (
            f"off: {share:.0%} would be padding, and on a CPU packing pays above {PAYS_ABOVE:.0%}"
        )
    return True, f"on: documents share micro-batches; side by side {share:.0%} would be padding"
