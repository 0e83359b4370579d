"""Rendered texts enter; token ids leave, as fast as the tokenizer goes.

Two savings over a call of the tokenizer for each text. The texts of a block of rows are tokenized,
on all cores, while Python renders the next block. And a prompt is not tokenized a second time to
see that its ids begin the whole text's: only its tail is, see `PromptBoundary`.
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
# Blocks that wait for the tokenizer, so that it never waits for Python.
AHEAD = 2


class PromptBoundary:
    """The special tokens at which a tokenizer cuts a text before it does anything else.

    What stands on either side of one is tokenized by itself. Where a prompt ends with
    `<|im_start|>assistant\\n`, its ids are those of the whole text up to that `<|im_start|>`, and
    then those of this short tail, which is the same for every row.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.template = tokenizer.chat_template
        # Only those that the template writes: fewer to look for, and others are no border of turns.
        chat = [
            {"role": "user", "content": PROBE_USER},
            {"role": "assistant", "content": PROBE_ASSISTANT},
        ]
        written = render_chat(tokenizer, chat, prompt=False)
        self._tokens = {
            text: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and not (token.lstrip or token.rstrip or token.normalized)
            if (text := str(token)) in written
        }

    def tail(self, prompt: str) -> str:
        """`prompt` from its last border on."""
        return prompt[max(self._last(prompt)[0], 0) :]

    def prompt_length(
        self, ids: list[int], text: str, prompt: str, tail: Sequence[int]
    ) -> int | None:
        """How many of `ids` are the prompt's; None where its tail is tokenized otherwise there.

        Args:
            ids: ids of `text`, which begins with `prompt`; a BOS may have been put before them.
            tail: ids of `self.tail(prompt)`.
        """
        begin, token = self._last(prompt)
        if begin < 0:
            at = next((shift for shift in (0, 1) if ids[shift : shift + len(tail)] == tail), None)
            return None if at is None else at + len(tail)
        number = self._tokens[token]
        if ids.count(number) - text.count(token) not in (0, int(ids[0] == number)):
            return None
        at = -1 if ids.count(number) == text.count(token) else 0
        for _ in range(prompt.count(token)):
            at = ids.index(number, at + 1)
        return at + len(tail) if ids[at : at + len(tail)] == tail else None

    def _last(self, prompt: str) -> tuple[int, str]:
        """Where the last border begins, and its text; (-1, "") without any."""
        # Nearly always it stands in the generation prompt: `<|im_start|>assistant\n`.
        for begin in (max(0, len(prompt) - 64), 0):
            found = max(((prompt.rfind(t, begin), t) for t in self._tokens), default=(-1, ""))
            if found[0] >= 0:
                break
        return found


_BORDERS: WeakKeyDictionary[Any, PromptBoundary] = WeakKeyDictionary()
_COPIES: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def borders_of(tokenizer: Any) -> PromptBoundary:
    """The borders of `tokenizer` with its present template; found once, again when it changes."""
    known = _BORDERS.get(tokenizer)
    if known is None or known.template != tokenizer.chat_template:
        known = _BORDERS[tokenizer] = PromptBoundary(tokenizer)
    return known


def tokenize_in_background(
    tokenizer: Any,
    blocks: Iterable[Drafted],
    texts_of: Callable[[Drafted], list[str]],
) -> Iterator[tuple[Drafted, Mapping[str, list[int]]]]:
    """Each block with the ids of its texts; one block is tokenized while the next is made.

    GSM8K-like rows spend as long in the tokenizer (which leaves Python free) as in rendering.
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
        made = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        made = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return dict(zip(texts, made, strict=True))


def _backend(tokenizer: Any) -> Any:
    """A copy of the Rust tokenizer, since the other one's settings change under a running call."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    known = _COPIES.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        own = tokenizer.backend_tokenizer
        copy = type(own).from_str(own.to_str())
        copy.no_padding()
        copy.no_truncation()
        known = _COPIES[tokenizer] = len(tokenizer), copy
    return known[1]


def tokenizer_key(tokenizer: Any) -> str | None:
    """Hash of all that decides the ids of a chat, its template too; None where it has no say."""
    backend = _backend(tokenizer)
    if backend is None:
        return None
    digest = hashlib.sha256(backend.to_str().encode())
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    digest.update(repr((special, tokenizer.encode(""), tokenizer.chat_template)).encode())
    return digest.hexdigest()
