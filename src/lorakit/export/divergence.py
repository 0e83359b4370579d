"""Predictions of two models along the same answers enter; how far they are apart leaves.

Shapes: N answer tokens, V vocabulary, C classes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.export.finite import is_finite, require_finite


def divergences(p: Any, q: Any) -> Any:
    """KL(p || q) in nats of each row of log-probabilities [N, C]; NaN stays NaN.

    Summed as p log(p / q) - p + q: the same, since both sum to 1, but no term is below zero, and
    float32 sums that are 1 to 1e-7 alone cancel out instead of ending up in the result.
    """
    import torch

    p, q = p.double(), q.double()
    terms = p.exp() * (p - q) - p.exp() + q.exp()
    # 0 log 0 is 0; for a computer -inf times 0 is NaN.
    terms = torch.where(p == -torch.inf, q.exp(), terms)
    return terms.clamp(min=0).sum(-1)


def summed(
    places: Sequence[tuple[Any, Any]], what: str, model: Any = None
) -> tuple[float, float, float, int]:
    """(KL in nats per token, share of equal top tokens, of equal answers, positions).

    Args:
        places: for each answer the divergence at each token, and whether the top token is equal.
        what: was compared, for the message.
        model: to look for the cause in, where a divergence is no number.

    Raises:
        WorkError: a divergence is NaN or infinite; names the answer and the token.
    """
    kl = same = whole = 0.0
    positions = 0
    for number, (divergence, equal) in enumerate(places, 1):
        if not is_finite(divergence) and model is not None:
            for name, parameter in model.named_parameters():
                require_finite(parameter, f"{name} of {what}")

        def place(at: int, number: int = number) -> str:
            return f"token {at + 1} of the answer to held-out prompt {number}"

        start = f"{what}: divergence from the adapter"
        require_finite(divergence, start, "please report this model family", place)
        kl += float(divergence.sum())
        same += float(equal.sum())
        whole += float(equal.all())
        positions += len(divergence)
    return kl / positions, same / positions, whole / len(places), positions


def compare(
    expected: Sequence[Any], found: Sequence[Any], what: str, model: Any = None
) -> tuple[float, float, float, int]:
    """As `summed`, from log-probabilities [N, V] of each answer."""
    places = [
        (divergences(p, q), p.argmax(-1) == q.argmax(-1))
        for p, q in zip(expected, found, strict=True)
    ]
    return summed(places, what, model)
