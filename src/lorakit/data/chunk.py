"""A long document enters; examples of at most `cutoff_len` tokens leave, every token trained once.

A window ends at a paragraph where one is near its end, else at a sentence, else at the last token
that fits. The end-of-text token follows the document's last token.
"""

from __future__ import annotations

import re
from typing import Any

from lorakit.records import IGNORE, Document, Example

# A border counts when it lies in the last part of a window; earlier ones would waste the rest.
NEAR_END = 0.5
BORDERS = (re.compile(r"\n\s*\n"), re.compile(r"(?<=[.!?])\s"))


def encode_document(tokenizer: Any, document: Document, cutoff_len: int) -> list[Example]:
    """Windows of a document as completion examples: all tokens trained but the first of each."""
    encoded = tokenizer(document.text, add_special_tokens=True, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
        offsets.append((len(document.text), len(document.text)))
    examples, start = [], 0
    while start < len(ids):
        end = _window_end(document.text, offsets, start, cutoff_len)
        part = ids[start:end]
        if len(part) > 1:
            examples.append(Example(part, [IGNORE, *part[1:]], document.origin))
        # One token is shared, so that the first token of a window is trained in the one before.
        start = end if end == len(ids) else end - 1
    return examples


def _window_end(text: str, offsets: list[tuple[int, int]], start: int, size: int) -> int:
    if len(offsets) - start <= size:
        return len(offsets)
    limit = start + size
    low, high = offsets[start + int(size * NEAR_END)][0], offsets[limit - 1][1]
    for border in BORDERS:
        found = [m.end() for m in border.finditer(text, low, high)]
        if found:
            for i in range(limit - 1, start + 1, -1):
                if offsets[i - 1][1] <= found[-1]:
                    return i
    return limit
