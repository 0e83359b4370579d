"""Score held-out examples: mean loss per supervised token.

The loss mask is that of training, and every token has the same weight regardless of its batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorakit.data.batching import collate
from lorakit.data.dataset import lengths_of
from lorakit.errors import WorkError
from lorakit.model.eval_mode import device_of, evaluating
from lorakit.train.loss import attach_loss, base_of, detach_loss
from lorakit.train.oom import run_catching_oom
from lorakit.types import EvalScore, Example

# Two rows of the default cutoff_len; without gradients this takes less memory than training.
BATCH_TOKENS = 4096


def score(
    model: Any,
    examples: Sequence[Example],
    pad_id: int,
    batch_tokens: int = BATCH_TOKENS,
    on_smaller: Callable[[int], None] | None = None,
) -> EvalScore:
    """Token-weighted negative log-likelihood of `examples` under `model`, in nats.

    Examples are scored longest first in batches of similar lengths, so that memory peaks at the
    start and padding is small. The model's mode is restored.

    Args:
        batch_tokens: padded tokens that go through the model at once (one example at least).
        on_smaller: called with the new `batch_tokens` after running out of memory lowered it.

    Raises:
        WorkError: the longest example alone runs out of memory.
    """
    sizes = lengths_of(examples)
    order = sorted(range(len(examples)), key=lambda i: -sizes[i])
    loss, tokens, start = 0.0, 0, 0
    with scoring(model):
        while start < len(order):
            size = max(1, batch_tokens // sizes[order[start]])
            rows = [examples[i] for i in order[start : start + size]]
            batch_loss, fault = run_catching_oom(functools.partial(_summed, model, rows, pad_id))
            if batch_loss is None:
                if len(rows) == 1:
                    raise too_long(rows[0], fault)
                batch_tokens = sizes[order[start]] * (len(rows) // 2)
                if on_smaller:
                    on_smaller(batch_tokens)
                continue
            loss += batch_loss
            tokens += sum(row.trained_tokens for row in rows)
            start += len(rows)
    return _mean(loss, tokens)


def combined(scores: Sequence[EvalScore]) -> EvalScore:
    """Combine scores of parts into the score of all examples; each token has the same weight."""
    if len(scores) == 1:
        return scores[0]
    return _mean(sum(s.loss * s.tokens for s in scores), sum(s.tokens for s in scores))


def _mean(loss: float, tokens: int) -> EvalScore:
    mean = loss / max(tokens, 1)
    return EvalScore(loss=mean, perplexity=math.exp(min(mean, 700.0)), tokens=tokens)


def not_finite(model: Any, examples: Sequence[Example], pad_id: int) -> list[Example]:
    """Those of `examples` whose loss alone is NaN or infinite; the model's mode is restored."""
    with scoring(model):
        return [e for e in examples if not math.isfinite(_summed(model, [e], pad_id))]


@contextmanager
def scoring(model: Any) -> Iterator[None]:
    """Attach the supervised loss and switch to evaluation mode."""
    attached = "forward" in base_of(model).__dict__
    if not attached:
        attach_loss(model)
    try:
        with evaluating(model):
            yield
    finally:
        if not attached:
            detach_loss(model)


def _summed(model: Any, rows: Sequence[Example], pad_id: int) -> float:
    """Summed loss of a few examples, in nats."""
    sequences = [sequence for row in rows for sequence in row.sequences]
    batch = {k: v.to(device_of(model)) for k, v in collate(sequences, pad_id).items()}
    return float(model(**batch, use_cache=False).loss_sum)


def too_long(row: Example, fault: str | None) -> WorkError:
    """Build the error for an example that alone is too long to score."""
    return WorkError(
        f"out of memory scoring {row.origin} alone ({len(row.input_ids)} tokens): {fault}",
        hint="give shorter held-out rows (val_data), or none (val_size: 0)",
    )
