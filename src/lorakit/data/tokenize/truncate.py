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

    begin, last = 0, len(borders) - 1
    while begin < last:
        # Double the step while the piece fits, then halve it: log2(n) trials for n exchanges.
        good, step = begin + 1, 1
        while good + step <= last and fits(piece(begin, good + step)):
            good, step = good + step, 2 * step
        while step > 1:
            step //= 2
            if good + step <= last and fits(piece(begin, good + step)):
                good += step
        yield piece(begin, good)
        begin = good
