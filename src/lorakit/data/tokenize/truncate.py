"""A conversation that is too long enters; conversations that fit leave, each answer in one of them.

Cut before questions only, so that each piece is a conversation of its own; the system turn and the
tools lead every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lorakit.types import Conversation


def split_conversation(
    conversation: Conversation, fits: Callable[[Conversation], bool]
) -> Iterator[Conversation]:
    """Pieces in order, as long as they fit. One exchange that does not fit comes by itself.

    Args:
        fits: is this piece short enough? A longer one never is where a shorter one is not.
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
        # Twice as much while it fits, then half the step: log2(n) trials for n exchanges.
        good, step = begin + 1, 1
        while good + step <= last and fits(piece(begin, good + step)):
            good, step = good + step, 2 * step
        while step > 1:
            step //= 2
            if good + step <= last and fits(piece(begin, good + step)):
                good += step
        yield piece(begin, good)
        begin = good
