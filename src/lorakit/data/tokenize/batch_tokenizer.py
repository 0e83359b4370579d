"""Tokenize rendered texts in batches.

This is faster than a call of the tokenizer for each text in two ways. The texts of a block of rows
are tokenized, on all cores, while Python renders the next block. And to check that the ids of a
prompt begin the ids of the complete text, only the tail of the prompt is tokenized again, see
`PromptBoundary`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from lorakit.data.chat_template.render import PROBE_ASSISTANT, PROBE_USER, render_chat

Drafted = TypeVar("Drafted")
# Blocks in the queue of the tokenizer, so that it does not wait for Python.
AHEAD = 2


class PromptBoundary:
    """Finds the length of a prompt in the ids of a text, by the special tokens at its borders.

    A tokenizer first splits a text at special tokens and tokenizes the parts independently. If a
    prompt ends with `<|im_start|>assistant\\n`, its ids are those of the complete text up to that
    `<|im_start|>`, followed by those of this short tail, which is the same for every row.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.template = tokenizer.chat_template
        # Only the tokens that the template writes: others do not separate turns.
        chat = [
            {"role": "user", "content": PROBE_USER},
            {"role": "assistant", "content": PROBE_ASSISTANT},
        ]
        written = render_chat(tokenizer, chat, prompt=False)
        self._tokens = {
            text: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and not (token.lstrip or token.rstrip or token.normalized)
            if (text := str(token)) in written
        }

    def tail(self, text: str, end: int) -> str:
        """Return the part of the prompt `text[:end]` from its last border on."""
        return text[max(self._last(text, end)[0], 0) : end]

    def tail_index(self, ids: list[int], text: str) -> Callable[[int], int | None]:
        """Return a function: the end of a prompt -> the index in `ids` at which its tail begins.

        Args:
            ids: ids of `text`, which begins with the prompts; a BOS may precede them.

        The function returns None if a prompt has no border, or if its border cannot be located.
        """

        @functools.cache
        def borders(token: str) -> dict[int, int]:
            """Offset of each border `token` in the text -> its index in the ids."""
            offsets = [match.start() for match in re.finditer(re.escape(token), text)]
            indices = indices_of(ids, self._tokens[token])
            if len(indices) - len(offsets) == 1 and indices[0] == 0:
                indices = indices[1:]  # the BOS
            return dict(zip(offsets, indices, strict=True)) if len(offsets) == len(indices) else {}

        def index(end: int) -> int | None:
            begin, token = self._last(text, end)
            return borders(token).get(begin) if begin >= 0 else None

        return index

    def prompt_lengths(
        self, ids: list[int], text: str, ends: Sequence[int], tails: Sequence[list[int]]
    ) -> list[int | None]:
        """Count the ids of each prompt `text[:end]` at the beginning of `ids`, the ids of `text`.

        Args:
            tails: ids of `self.tail(text, end)` for each end.

        Returns:
            The number of ids, or None if the tail has other ids within `text`.
        """
        index = self.tail_index(ids, text)
        lengths: list[int | None] = []
        for end, tail in zip(ends, tails, strict=True):
            at = index(end)
            # Without a border the tail is the complete prompt, and a BOS may precede it.
            at_start = (0, 1) if self._last(text, end)[0] < 0 else ()
            begins = at_start if at is None else (at,)
            fitting = [b for b in begins if ids[b : b + len(tail)] == tail]
            lengths.append(fitting[0] + len(tail) if fitting else None)
        return lengths

    def _last(self, text: str, end: int) -> tuple[int, str]:
        """Offset and token of the last border before `end`; (-1, "") without a border."""
        # It is nearly always in the generation prompt: `<|im_start|>assistant\n`.
        for begin in (max(0, end - 64), 0):
            last = max(((text.rfind(t, begin, end), t) for t in self._tokens), default=(-1, ""))
            if last[0] >= 0:
                break
        return last


def indices_of(ids: list[int], token: int) -> list[int]:
    """Indices at which `token` occurs in `ids`."""
    indices = [-1]
    for _ in range(ids.count(token)):
        indices.append(ids.index(token, indices[-1] + 1))
    return indices[1:]


_BORDERS: WeakKeyDictionary[Any, PromptBoundary] = WeakKeyDictionary()
_COPIES: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def borders_of(tokenizer: Any) -> PromptBoundary:
    """Return the prompt borders of `tokenizer`; cached until its template changes."""
    cached = _BORDERS.get(tokenizer)
    if cached is None or cached.template != tokenizer.chat_template:
        cached = _BORDERS[tokenizer] = PromptBoundary(tokenizer)
    return cached


def tokenize_in_background(
    tokenizer: Any,
    blocks: Iterable[Drafted],
    texts_of: Callable[[Drafted], list[str]],
) -> Iterator[tuple[Drafted, Mapping[str, list[int]]]]:
    """Yield each block with the ids of its texts; a block is tokenized while the next is made.

    GSM8K-like rows spend as long in the tokenizer (which releases the GIL) as in rendering.
    """
    waiting: deque[tuple[Drafted, Future[dict[str, list[int]]]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for block in blocks:
            waiting.append((block, pool.submit(_tokenize, tokenizer, texts_of(block))))
            if len(waiting) > AHEAD:
                done, job = waiting.popleft()
                yield done, job.result()
        for done, job in waiting:
            yield done, job.result()


def _tokenize(tokenizer: Any, texts: list[str]) -> dict[str, list[int]]:
    texts = list(dict.fromkeys(texts))
    if not texts:
        return {}
    backend = _backend(tokenizer)
    if backend is None:
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return dict(zip(texts, ids, strict=True))


def _backend(tokenizer: Any) -> Any:
    """Copy the Rust tokenizer, whose settings would otherwise change during a running call."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    cached = _COPIES.get(tokenizer)
    if cached is None or cached[0] != len(tokenizer):
        original = tokenizer.backend_tokenizer
        copy = type(original).from_str(original.to_str())
        copy.no_padding()
        copy.no_truncation()
        cached = _COPIES[tokenizer] = len(tokenizer), copy
    return cached[1]


def tokenizer_key(tokenizer: Any) -> str | None:
    """Hash a tokenizer and its template; None for a slow tokenizer, which cannot be hashed."""
    backend = _backend(tokenizer)
    if backend is None:
        return None
    digest = hashlib.sha256(backend.to_str().encode())
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    digest.update(repr((special, tokenizer.encode(""), tokenizer.chat_template)).encode())
    return digest.hexdigest()
