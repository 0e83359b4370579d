"""A document's text and where its tokens begin enter; windows of tokens leave, cut at good places.

A window ends at the last paragraph border of its second half, else at the last sentence border
there, else where it is full. Windows follow one another without gap or overlap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*\Z")
_SENTENCE = re.compile(r"""(?:[.!?]["')\]»”’]*\s+|[。！？]["'」』”’]*\s*|\n\s*)\Z""")
# How far back from a cut the text is looked at: a sentence end with its quotes and white space.
_LOOK_BACK = 16


def windows(
    text: str, starts: Sequence[int] | None, count: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Pairs (begin, end) of token indices that cover 0..count once, each at most `limit` long.

    Args:
        starts: character at which each token begins; None where a tokenizer cannot say, then
            windows are simply full.
        count: number of tokens.
        limit: longest window in tokens.
    """
    begin = 0
    while begin < count:
        end = min(begin + limit, count)
        if end < count and starts is not None:
            end = _good_end(text, starts, begin, end)
        yield begin, end
        begin = end


def _good_end(text: str, starts: Sequence[int], begin: int, full: int) -> int:
    halfway = begin + (full - begin) // 2
    sentence = 0
    for end in range(full, halfway, -1):
        before = _text_before(text, starts[end])
        if _PARAGRAPH.search(before):
            return end
        if not sentence and _SENTENCE.search(before):
            sentence = end
    return sentence or full


def _text_before(text: str, at: int) -> str:
    """The text before a cut; a space that the next token carries (Ġword, ▁word) counts to it."""
    while at < len(text) and text[at] in " \n\t":
        at += 1
    return text[max(0, at - _LOOK_BACK) : at]
