"""Turns and a tokenizer enter; rendered text and token ids leave, and the habits of the template.

Habits are found by rendering probes, not by reading the template: which token it writes after an
answer, whether it takes a system turn, whether the tokenizer puts a BOS before a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from lorakit.errors import DataError
from lorakit.records import Message

# What the probes say: the question, the answer, the system text.
ASK, SAY, SET = "Q7qzx", "A7qzx", "S7qzx"
# Two private planes of Unicode: one stands in for special tokens that occur as text in a turn.
_PRIVATE = (0xF0000, 0x100000)


class TemplateRefusal(DataError):
    """The chat template raised on these turns."""


@dataclass(frozen=True, slots=True)
class Habits:
    """What a tokenizer with its template does, found by rendering probes."""

    template: str
    stops: tuple[int, ...]
    stop_texts: tuple[str, ...]
    folds_system: bool
    bos_id: int | None  # set where the tokenizer puts a BOS before a text
    specials: re.Pattern[str] | None
    special_texts: tuple[str, ...]


_KNOWN: WeakKeyDictionary[Any, Habits] = WeakKeyDictionary()


def habits_of(tokenizer: Any) -> Habits:
    """Habits of `tokenizer` with its present template; found once, again when it changes."""
    template = str(tokenizer.chat_template)
    known = _KNOWN.get(tokenizer)
    if known is not None and known.template == template:
        return known
    special = {str(t) for t in tokenizer.all_special_tokens}
    special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    texts = tuple(sorted(special - {""}, key=lambda t: (-len(t), t)))
    stops = _stop_texts(tokenizer)
    first = tokenizer.encode("")[:1]
    adds_bos = bool(first) and first == [tokenizer.bos_token_id]
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    found = Habits(
        template=template,
        stops=tuple(dict.fromkeys(i for i in ids if i is not None)),
        stop_texts=stops,
        folds_system=_refuses_system(tokenizer),
        bos_id=tokenizer.bos_token_id if adds_bos else None,
        specials=re.compile("|".join(re.escape(t) for t in texts)) if texts else None,
        special_texts=texts,
    )
    _KNOWN[tokenizer] = found
    return found


def _stop_texts(tokenizer: Any) -> tuple[str, ...]:
    """The special token that the template writes after an answer, if it writes one."""
    if not tokenizer.chat_template:
        return (tokenizer.eos_token,) if tokenizer.eos_token else ()
    chat = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]
    tail = render(tokenizer, chat, prompt=False).rpartition(SAY)[2]
    known = {str(t): None for t in tokenizer.added_tokens_decoder.values()}
    known |= {str(t): None for t in tokenizer.all_special_tokens}
    longest_first = sorted(filter(None, known), key=lambda t: -len(t))
    return tuple(t for t in longest_first if tail.lstrip().startswith(t))[:1]


def _refuses_system(tokenizer: Any) -> bool:
    if not tokenizer.chat_template:
        return False
    chat = [{"role": "system", "content": SET}, {"role": "user", "content": ASK}]
    try:
        return SET not in render(tokenizer, chat, prompt=True)
    except TemplateRefusal:
        return True


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids at which generation stops: the template's end of turn, eos, and the model's own."""
    found = [*habits_of(tokenizer).stops, tokenizer.eos_token_id]
    own = getattr(generation_config, "eos_token_id", None)
    found += own if isinstance(own, list | tuple) else [own]
    return list(dict.fromkeys(int(i) for i in found if i is not None))


# -- texts and tokens -----------------------------------------------------------------------------


class Guard:
    """Keeps special tokens that occur as text inside a turn from becoming control tokens.

    A user who writes "<|im_end|>" must not end a turn. Such texts travel through the template as
    private characters and are tokenized as the plain text they are.
    """

    def __init__(self, habits: Habits, messages: Sequence[Message]) -> None:
        self._marks: dict[str, str] = {}
        self._fold = habits.folds_system
        contents = [m.content for m in messages]
        if habits.specials is None or not any(habits.specials.search(c) for c in contents):
            return
        count = len(habits.special_texts)
        for base in _PRIVATE:
            if not any(base <= ord(char) < base + count for c in contents for char in c):
                break
        else:
            raise DataError("a turn holds characters of both private planes of Unicode")
        self._marks = {text: chr(base + i) for i, text in enumerate(habits.special_texts)}
        self._texts = {mark: text for text, mark in self._marks.items()}
        self._pattern = habits.specials

    @property
    def active(self) -> bool:
        """True when some turn holds a special token as text."""
        return bool(self._marks)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The turns as the template takes them."""
        made = [{"role": m.role, "content": self._hide(m.content)} for m in messages]
        if self._fold and len(made) > 1 and made[0]["role"] == "system":
            system, first, *rest = made
            joined = f"{system['content'].strip()}\n\n{first['content']}"
            return [{"role": first["role"], "content": joined}, *rest]
        return made

    def _hide(self, content: str) -> str:
        if not self._marks:
            return content
        return self._pattern.sub(lambda found: self._marks[found.group()], content)

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """(text, is plain text that looks special) in order."""
        if not self._marks:
            return [(text, False)]
        split = re.split("([" + "".join(self._texts) + "])", text)
        return [(self._texts.get(piece, piece), piece in self._texts) for piece in split if piece]


def render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool, **options: Any) -> str:
    """The text of `messages`; with `prompt`, ready for the next answer.

    Raises:
        TemplateRefusal: the template raised.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **options
        )
    # A template is a program of the model's author: it may raise anything.
    except Exception as error:
        raise TemplateRefusal(f"the chat template refuses it: {error}") from error
    return str(text)


def to_ids(
    tokenizer: Any,
    text: str,
    guard: Guard | None,
    inside: bool = False,
    known: Mapping[str, list[int]] | None = None,
) -> list[int]:
    """Ids [T] of a rendered text; a BOS is put before it where the tokenizer would and none is.

    Args:
        inside: the text continues another one: no BOS.
        known: ids of texts that were tokenized before.
    """
    ids: list[int] = []
    if known and text in known:
        ids += known[text]
    else:
        for piece, plain in guard.pieces(text) if guard else [(text, False)]:
            options = {"split_special_tokens": True} if plain else {}
            ids += tokenizer(piece, add_special_tokens=False, verbose=False, **options)["input_ids"]
    bos = None if inside else habits_of(tokenizer).bos_id
    return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids
