"""Tokenize rendered texts in batches.

This is faster than a call of the tokenizer for each text in two ways. The texts of a block of rows
are tokenized, on all cores, while Python renders the next block. And to check that the ids of a
prompt begin the ids of the complete text, only the tail of the prompt is tokenized again, see
`PromptBoundary`.
"""

from __future__ import annotations

import hashlib
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

    def tail(self, prompt: str) -> str:
        """Return the part of `prompt` from its last border on."""
        return prompt[max(self._last(prompt)[0], 0) :]

    def prompt_length(
        self, ids: list[int], text: str, prompt: str, tail: Sequence[int]
    ) -> int | None:
        """Count the ids of the prompt at the beginning of `ids`.

        Args:
            ids: ids of `text`, which begins with `prompt`; a BOS may precede them.
            tail: ids of `self.tail(prompt)`.

        Returns:
            The number of ids, or None if the tail has other ids within `text`.
        """
        begin, token = self._last(prompt)
        if begin < 0:
            at = next((shift for shift in (0, 1) if ids[shift : shift + len(tail)] == tail), None)
            return None if at is None else at + len(tail)
        token_id = self._tokens[token]
        if ids.count(token_id) - text.count(token) not in (0, int(ids[0] == token_id)):
            return None
        at = -1 if ids.count(token_id) == text.count(token) else 0
        for _ in range(prompt.count(token)):
            at = ids.index(token_id, at + 1)
        return at + len(tail) if ids[at : at + len(tail)] == tail else None

    def _last(self, prompt: str) -> tuple[int, str]:
        """Offset and text of the last border in `prompt`; (-1, "") without a border."""
        # It is nearly always in the generation prompt: `<|im_start|>assistant\n`.
        for begin in (max(0, len(prompt) - 64), 0):
            last = max(((prompt.rfind(t, begin), t) for t in self._tokens), default=(-1, ""))
            if last[0] >= 0:
                break
        return last


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
