"""Split a conversation that is too long into conversations that fit.

It is cut before questions only, so that each piece is a complete conversation with each answer in
one piece; the system turn and the tools are repeated in every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lorakit.types import Conversation


def split_conversation(
    conversation: Conversation, fits: Callable[[Conversation], bool]
) -> Iterator[Conversation]:
    """Yield pieces in order, each as long as possible; an exchange that does not fit is one piece.

    Args:
        fits: returns True for a piece that is short enough; if a piece is not, a longer one must
            not be either.
    """
    messages = conversation.messages
    head = messages[:1] if messages[0].role == "system" else ()
    borders = [i for i, m in enumerate(messages) if m.role == "user"] or [len(head)]
    borders[0] = len(head)
    borders.append(len(messages))

    def piece(begin: int, end: int) -> Conversation:
        return replace(conversation, messages=head + messages[borders[begin] : borders[end]])

    begin, size, last = 0, 2, len(borders) - 1
    while begin < last:

        def ends_well(end: int, begin: int = begin) -> bool:
            return fits(piece(begin, end))

        end = _last_that_fits(begin + 1, last, begin + size, ends_well)
        yield piece(begin, end)
        # Pieces are about as long as their neighbors, so that the next one takes few trials.
        begin, size = end, end - begin


def _last_that_fits(low: int, high: int, near: int, fits: Callable[[int], bool]) -> int:
    """Find the largest number up to `high` that fits; `low` is taken without a trial.

    Args:
        near: the number to try first. From there the steps double, and are halved at the end.
    """
    step, grows = 1, None
    while low < high:
        at = min(max(near, low + 1), high)
        fit = fits(at)
        low, high = (at, high) if fit else (low, at - 1)
        if grows not in (None, fit):  # the border is passed
            step = 0
        grows = fit
        near = at + (step if fit else -step) if step else (low + high + 1) // 2
        step *= 2
    return low
