"""Hidden states of supervised tokens and their targets enter; the summed cross-entropy leaves.

    loss = sum_i  logsumexp(head(h_i)) - head(h_i)[t_i]          h [N, D], head: D -> V, t [N]

Only supervised tokens come here (the caller gathers them), so prompt and padding positions never
meet the vocabulary. Logits exist for one chunk at a time: with V = 32,000 and 2,048 tokens a
full float32 copy and its gradient would take 0.5 GB, with V = 152,000 2.5 GB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Bytes of float32 logits that may live at once; below it nothing is recomputed in backward.
LOGITS_BYTES = 512 * 1024**2

Head = Callable[[Tensor], Tensor]


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, logits_bytes: int = LOGITS_BYTES
) -> Tensor:
    """Sum of -log p(target) in nats over N tokens, a float32 scalar.

    Args:
        hidden: [N, D] hidden states of the positions that predict `targets`.
        targets: [N] token ids; IGNORE is not allowed here.
        head: maps [n, D] to logits [n, V]; may hold trainable parameters.
        logits_bytes: budget for float32 logits; more tokens are cut into chunks, each recomputed in
            backward (one more head product, about 0.7% of a Llama-2-7B step).
    """
    if hidden.shape[0] == 0:
        return hidden.sum().float() * 0.0
    vocabulary = _vocabulary_size(head, hidden)
    rows = max(1, logits_bytes // (4 * vocabulary))
    if hidden.shape[0] <= rows:
        return reference(hidden, targets, head)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(reference, part, target, head, use_reentrant=False)
    return total


def reference(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The definition: all logits at once, in float32."""
    return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _vocabulary_size(head: Head, hidden: Tensor) -> int:
    size = getattr(head, "vocabulary", None)
    if size is not None:
        return int(size)
    with torch.no_grad():
        return head(hidden[:1]).shape[-1]
