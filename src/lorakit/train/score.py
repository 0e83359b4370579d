"""A model and held-out examples enter; the mean loss per trained token leaves.

The mask is the training mask, and every token weighs the same whatever batch it falls into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lorakit.data.batch import collate
from lorakit.data.shelf import lengths_of
from lorakit.model.modes import device_of, evaluating
from lorakit.records import EvalScore, Example
from lorakit.train.loss import attach_loss, base_of, detach_loss

# Two rows of the default cutoff_len; without gradients that is less memory than training takes.
BATCH_TOKENS = 4096


def score(
    model: Any,
    examples: Sequence[Example],
    pad_id: int,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvalScore:
    """Token-weighted negative log-likelihood of `examples` under `model`, in nats.

    Examples are scored longest first in batches of similar lengths, so that memory peaks at the
    start and little is spent on padding. The model's mode is restored.

    Args:
        batch_tokens: padded tokens that go through the model at once (one example at least).
        on_batch: called with the number of examples done and their total.
    """
    attached = "forward" in base_of(model).__dict__
    if not attached:
        attach_loss(model)
    sizes = lengths_of(examples)
    order = sorted(range(len(examples)), key=lambda i: -sizes[i])
    loss, tokens = 0.0, 0
    try:
        with evaluating(model):
            start = 0
            while start < len(order):
                size = max(1, batch_tokens // sizes[order[start]])
                rows = [examples[i] for i in order[start : start + size]]
                batch = {k: v.to(device_of(model)) for k, v in collate(rows, pad_id).items()}
                out = model(**batch, use_cache=False)
                loss += float(out.loss_sum)
                tokens += batch["targets"].numel()
                start += len(rows)
                if on_batch:
                    on_batch(start, len(order))
    finally:
        if not attached:
            detach_loss(model)
    mean = loss / max(tokens, 1)
    return EvalScore(loss=mean, perplexity=math.exp(min(mean, 700.0)), tokens=tokens)
