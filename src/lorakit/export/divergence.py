"""KL divergence between the predictions of two models along the same answers.

Shapes: N answer tokens, V vocabulary, C classes of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.export.finite import is_finite, require_finite


def divergences(p: Any, q: Any) -> Any:
    """Compute KL(p || q) in nats of each row of log-probabilities [N, C]; NaN stays NaN.

    Summed as p log(p / q) - p + q, which is equal since both sum to 1. No term is negative, and the
    1e-7 by which float32 probabilities miss a sum of 1 cancels out of the result.
    """
    import torch

    p, q = p.double(), q.double()
    terms = p.exp() * (p - q) - p.exp() + q.exp()
    # 0 log 0 is 0, but -inf times 0 is NaN.
    terms = torch.where(p == -torch.inf, q.exp(), terms)
    return terms.clamp(min=0).sum(-1)


def summed(
    scores: Sequence[tuple[Any, Any]], what: str, model: Any = None
) -> tuple[float, float, float, int]:
    """Average the divergences of several answers.

    Args:
        scores: for each answer the KL of each token, and a mask of equal top tokens.
        what: name of the compared model, for the message.
        model: its parameters are searched for the cause of a non-finite divergence.

    Returns:
        (KL in nats per token, share of equal top tokens, share of answers where all top tokens are
        equal, positions).

    Raises:
        WorkError: a divergence is NaN or infinite; names the answer and the token.
    """
    kl = same = equal_answers = 0.0
    positions = 0
    for answer, (divergence, equal) in enumerate(scores, 1):
        if not is_finite(divergence) and model is not None:
            for name, parameter in model.named_parameters():
                require_finite(parameter, f"{name} of {what}")

        def describe(at: int, answer: int = answer) -> str:
            return f"token {at + 1} of the answer to held-out prompt {answer}"

        start = f"{what}: divergence from the adapter"
        require_finite(divergence, start, "please report this model family", describe)
        kl += float(divergence.sum())
        same += float(equal.sum())
        equal_answers += float(equal.all())
        positions += len(divergence)
    return kl / positions, same / positions, equal_answers / len(scores), positions


def compare(
    expected: Sequence[Any], found: Sequence[Any], what: str, model: Any = None
) -> tuple[float, float, float, int]:
    """Compute `summed` from log-probabilities [N, V] of each answer."""
    scores = [
        (divergences(p, q), p.argmax(-1) == q.argmax(-1))
        for p, q in zip(expected, found, strict=True)
    ]
    return summed(scores, what, model)
