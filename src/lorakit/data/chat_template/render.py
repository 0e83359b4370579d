"""Turns and a tokenizer enter; rendered text and token ids leave, and the habits of the template.

Habits are found by rendering probes, not by reading the template: which token it writes after an
answer, whether it takes a system turn and tools, whether the tokenizer puts a BOS before a text.

A chat template's text enters; a program leaves that turns conversations into text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from lorakit.data.chat_template.sandbox import LimitedEnvironment, LimitReached
from lorakit.errors import DataError, LorakitError, ModelError
from lorakit.types import Message

# What the probes say: the question, the answer, the system text.
PROBE_USER, PROBE_ASSISTANT, PROBE_SYSTEM = "Q7qzx", "A7qzx", "S7qzx"
# And of tools: what one is for, an argument's name and value, what came back.
_PURPOSE, _KEY, _VALUE, _RESULT = "T7qzx", "k7qzx", "v7qzx", "R7qzx"
# A block around what the model itself says: the template's own word on what to train.
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Texts that are meant as one token: <|im_end|>, <end_of_turn>.
_MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_turn>")
# Two private planes of Unicode: one stands in for special tokens that occur as text in a turn.
_PRIVATE = (0xF0000, 0x100000)


class TemplateRefusal(DataError):
    """The chat template raised on these turns, or they cannot be put through it."""


@dataclass(frozen=True, slots=True)
class TemplateCapabilities:
    """What a tokenizer with its template does, found by rendering probes."""

    template: str
    stops: tuple[int, ...]
    stop_texts: tuple[str, ...]
    closer: str  # what the next turn begins with, where that is what ends an answer
    call_closer: str  # and a call of tools
    folds_system: bool
    bos_id: int | None  # set where the tokenizer puts a BOS before a text
    specials: re.Pattern[str] | None
    special_texts: tuple[str, ...]
    marks_answers: bool  # by {% generation %} blocks
    arguments_as_text: bool  # of tool calls; most templates take an object
    unwritten: tuple[str, ...]  # which of tool schemas, calls and results it leaves out


_KNOWN: WeakKeyDictionary[Any, TemplateCapabilities] = WeakKeyDictionary()


def template_capabilities(tokenizer: Any) -> TemplateCapabilities:
    """Habits of `tokenizer` with its present template; found once, again when it changes."""
    template = str(tokenizer.chat_template)
    known = _KNOWN.get(tokenizer)
    if known is not None and known.template == template:
        return known
    special = {str(t) for t in tokenizer.all_special_tokens}
    special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    texts = tuple(sorted(special - {""}, key=lambda t: (-len(t), t)))
    tools = _tool_habits(tokenizer)
    stops, closer = _stop_texts(tokenizer)
    # gpt-oss closes a call with <|call|>, an answer with <|return|>.
    call_closer = tools.closer if closer else ""
    others = [t for t in (tools.stop, call_closer.strip()) if t]
    stops = tuple(dict.fromkeys((*stops, *others))) if stops else stops
    first = tokenizer.encode("")[:1]
    adds_bos = bool(first) and first == [tokenizer.bos_token_id]
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    found = TemplateCapabilities(
        template=template,
        stops=tuple(dict.fromkeys(i for i in ids if i is not None)),
        stop_texts=stops,
        closer=closer,
        call_closer=call_closer,
        folds_system=_refuses_system(tokenizer),
        bos_id=tokenizer.bos_token_id if adds_bos else None,
        specials=re.compile("|".join(re.escape(t) for t in texts)) if texts else None,
        special_texts=texts,
        marks_answers=bool(_GENERATION.search(template)),
        arguments_as_text=tools.as_text,
        unwritten=tools.unwritten,
    )
    _KNOWN[tokenizer] = found
    return found


def _stop_texts(tokenizer: Any) -> tuple[tuple[str, ...], str]:
    """The special token that the template writes after an answer, if any, and a `closer`."""
    if not tokenizer.chat_template:
        return ((tokenizer.eos_token,) if tokenizer.eos_token else ()), ""
    chat = [
        {"role": "user", "content": PROBE_USER},
        {"role": "assistant", "content": PROBE_ASSISTANT},
    ]
    tail = render_chat(tokenizer, chat, prompt=False).rpartition(PROBE_ASSISTANT)[2]
    known = {str(t): None for t in tokenizer.added_tokens_decoder.values()}
    known |= {str(t): None for t in tokenizer.all_special_tokens}
    longest_first = sorted(filter(None, known), key=lambda t: -len(t))
    stops = tuple(t for t in longest_first if tail.lstrip().startswith(t))[:1]
    if stops or tail.strip():
        return stops, ""
    # GLM-4: <|user|>ask<|assistant|>say<|user|>: the next turn's role token is what ends an answer.
    try:
        text = render_chat(
            tokenizer, [*chat, {"role": "user", "content": PROBE_SYSTEM}], prompt=False
        )
    except TemplateRefusal:
        return (), ""
    asked, _, after = text.rpartition(PROBE_ASSISTANT)
    opening = [t for t in longest_first if t in asked.partition(PROBE_USER)[2]]
    ends = [t for t in longest_first if after.lstrip().startswith(t)][:1]
    # Anything else than one token for each role (<|im_start|>assistant) lost its end of turn.
    if not ends or len(opening) != 1 or ends[0] in (*opening, tokenizer.bos_token):
        return (), ""
    return tuple(ends), after[len(tail) : after.index(ends[0]) + len(ends[0])]


@dataclass(frozen=True, slots=True)
class _ToolHabits:
    as_text: bool = False
    unwritten: tuple[str, ...] = ()
    stop: str = ""  # the last special token after a call
    closer: str = ""  # what a result begins with


def _tool_habits(tokenizer: Any) -> _ToolHabits:
    """How the template writes tools. Where it raises on the probe, each row finds out itself."""
    if not tokenizer.chat_template:
        return _ToolHabits()
    schema = {"type": "object", "properties": {"q": {"type": "string", "description": "query"}}}
    function = {"name": "find", "description": _PURPOSE, "parameters": schema}
    tools = [{"type": "function", "function": function}]

    def told(chat: list[dict[str, Any]]) -> str | None:
        try:
            return render_chat(tokenizer, chat, prompt=False, tools=tools)
        except TemplateRefusal:
            return None

    ask, call = {"role": "user", "content": PROBE_USER}, _probe_call(as_text=False)
    text = told([ask, call])
    as_text = not _writes_call(text) and _writes_call(told([ask, _probe_call(as_text=True)]))
    if as_text:
        call = _probe_call(as_text=True)
        text = told([ask, call])
    result = {"role": "tool", "content": _RESULT, "tool_call_id": "call7qzx0", "name": "find"}
    whole = told([ask, call, result])
    parts = {
        "tool schemas": _PURPOSE in (told([ask]) or _PURPOSE),
        "tool calls": text is None or _writes_call(text),
        "tool results": _RESULT in (whole or _RESULT),
    }
    said = (text or "").partition(PROBE_USER)[2]
    specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} - {""}
    stop = max((s for s in specials if s in said), key=said.rfind, default="")
    # Gemma 4's <|"|> stands around every text of a call: such a token ends nothing.
    stop = stop if said.count(stop) == 1 and said.find(stop) > said.find(_VALUE) else ""
    closer = ""
    if text and whole and whole.startswith(text):
        after = whole[len(text) :]
        token = next((s for s in specials if after.lstrip().startswith(s)), "")
        closer = after[: after.index(token) + len(token)] if token else ""
    unwritten = tuple(part for part, there in parts.items() if not there)
    return _ToolHabits(as_text, unwritten, stop, closer)


def _probe_call(as_text: bool) -> dict[str, Any]:
    given: Any = {_KEY: _VALUE}
    function = {"name": "find", "arguments": json.dumps(given) if as_text else given}
    # Mistral's template wants ids of nine letters and digits.
    call = {"id": "call7qzx0", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _writes_call(text: str | None) -> bool:
    """Python's own spelling of an object ('k) or JSON within JSON (\\"k) is a wrong form."""
    if text is None or f"'{_KEY}" in text or f'\\"{_KEY}' in text:
        return False
    return _KEY in text and _VALUE in text


def unknown_marks(tokenizer: Any) -> list[str]:
    """Texts such as <|im_start|> that the template writes and this tokenizer has no token for."""
    chat = [
        {"role": "user", "content": PROBE_USER},
        {"role": "assistant", "content": PROBE_ASSISTANT},
    ]
    found = dict.fromkeys(_MARK.findall(render_chat(tokenizer, chat, prompt=False)))
    return [mark for mark in found if len(tokenizer(mark, add_special_tokens=False).input_ids) > 1]


def _refuses_system(tokenizer: Any) -> bool:
    if not tokenizer.chat_template:
        return False
    chat = [{"role": "system", "content": PROBE_SYSTEM}, {"role": "user", "content": PROBE_USER}]
    try:
        return PROBE_SYSTEM not in render_chat(tokenizer, chat, prompt=True)
    except TemplateRefusal:
        return True


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids at which generation stops: the template's end of turn, eos, and the model's own."""
    found = [*template_capabilities(tokenizer).stops, tokenizer.eos_token_id]
    own = getattr(generation_config, "eos_token_id", None)
    found += own if isinstance(own, list | tuple) else [own]
    return list(dict.fromkeys(int(i) for i in found if i is not None))


# -- texts and tokens -----------------------------------------------------------------------------


class SpecialTokenEscaper:
    """Keeps special tokens that occur as text inside a turn from becoming control tokens.

    A user who writes "<|im_end|>" must not end a turn. Such texts travel through the template as
    private characters and are tokenized as the plain text they are.
    """

    def __init__(
        self,
        habits: TemplateCapabilities,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._marks: dict[str, str] = {}
        self._habits = habits
        self._tools = tools
        if habits.specials is None:
            return
        texts = [m.content for m in messages]
        texts += [*_texts([m.extra for m in messages if m.extra]), *_texts(list(tools))]
        if not any(habits.specials.search(t) for t in texts):
            return
        count = len(habits.special_texts)
        for base in _PRIVATE:
            if not any(base <= ord(char) < base + count for t in texts for char in t):
                break
        else:
            raise TemplateRefusal("a turn holds characters of both private planes of Unicode")
        self._marks = {text: chr(base + i) for i, text in enumerate(habits.special_texts)}
        self._texts = {mark: text for text, mark in self._marks.items()}
        self._pattern = habits.specials

    @property
    def active(self) -> bool:
        """True when some turn holds a special token as text."""
        return bool(self._marks)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The turns as the template takes them."""
        made = [
            self._hide(m.as_dict()) if m.extra or self._marks else m.as_dict() for m in messages
        ]
        if self._habits.arguments_as_text:
            for call in (c["function"] for m in made for c in m.get("tool_calls", ())):
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        if self._habits.folds_system and len(made) > 1 and made[0]["role"] == "system":
            system, first, *rest = made
            joined = f"{system['content'].strip()}\n\n{first['content']}"
            return [{**first, "content": joined}, *rest]
        return made

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The schemas of the functions as the template takes them."""
        return [self._hide(tool) for tool in self._tools] or None

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str) and self._marks:
            return self._pattern.sub(lambda found: self._marks[found.group()], value)
        if isinstance(value, Mapping):
            return {self._hide(k): self._hide(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(v) for v in value]
        return value

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """(text, is plain text that looks special) in order."""
        if not self._marks:
            return [(text, False)]
        split = re.split("([" + "".join(self._texts) + "])", text)
        return [(self._texts.get(piece, piece), piece in self._texts) for piece in split if piece]


def _texts(value: Any) -> Iterator[str]:
    """All texts inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], prompt: bool, **options: Any
) -> str:
    """The text of `messages`; with `prompt`, ready for the next answer. `tools` is an option.

    Raises:
        TemplateRefusal: the template raised.
        ModelError: it would not end, or outgrow all memory.
    """
    values = {**options, "messages": _aliased(messages), "add_generation_prompt": prompt}
    try:
        return _program(tokenizer).render(values)
    # A template is a program of the model's author: it may raise anything.
    except Exception as error:
        raise _refusal(tokenizer, error) from error


def generated_parts(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any
) -> list[tuple[int, int]]:
    """Where in the text of `messages` the template's {% generation %} blocks begin and end."""
    values = {"messages": _aliased(messages), "tools": tools, "add_generation_prompt": False}
    try:
        return _program(tokenizer).generated(values)
    except Exception as error:
        raise _refusal(tokenizer, error) from error


# tokenizer -> its template and the compiled program
_PROGRAMS: WeakKeyDictionary[Any, tuple[str, Program]] = WeakKeyDictionary()


def _program(tokenizer: Any) -> Program:
    template = tokenizer.chat_template
    known = _PROGRAMS.get(tokenizer)
    if not isinstance(template, str):
        raise ValueError("the tokenizer has none, or several of which none was chosen")
    if known is None or known[0] != template:
        known = template, Program(template, tokenizer.special_tokens_map)
        _PROGRAMS[tokenizer] = known
    return known[1]


def _aliased(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thoughts under the name that gpt-oss' template reads, too, as `apply_chat_template` does."""
    for message in messages:
        if len(message) > 2:
            break
    else:
        return messages
    return [
        {"thinking": m["reasoning_content"], **m} if m.get("reasoning_content") is not None else m
        for m in messages
    ]


def _refusal(tokenizer: Any, error: Exception) -> LorakitError:
    """A row's fault; but where the template would not end, that of the model."""
    if isinstance(error, LimitReached):
        return ModelError(
            f"{_template_file(tokenizer)}: this chat template was stopped: it {error}",
            hint="no published model needs that: take the template that came with the model, and "
            "do not trust the place this one came from",
        )
    return TemplateRefusal(f"the chat template refuses it: {error}")


def _template_file(tokenizer: Any) -> str:
    folder = Path(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
    names = [n for n in ("chat_template.jinja", "tokenizer_config.json") if (folder / n).is_file()]
    return str(folder / names[0]) if names else str(folder)


def to_ids(
    tokenizer: Any,
    text: str,
    guard: SpecialTokenEscaper | None,
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
    bos = None if inside else template_capabilities(tokenizer).bos_id
    return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids


T = TypeVar("T")


class Program:
    """A compiled template, ready to be rendered with turns."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        """Compile `text`; `names` are what it sees beside the turns.

        Raises:
            LimitReached: it is too long, or uses what is not run.
            TemplateError: it is no jinja2.
        """
        self._env = LimitedEnvironment(_plain_environment())
        self._template = self._env.from_string(text)
        self._names = {**self._template.globals, "tools": None, "documents": None, **names}

    def render(self, values: dict[str, Any]) -> str:
        """The text, in 6 µs for three turns; jinja2's own `render_chat` copies all names one by
        one.

        Raises:
            LimitReached: with the line of the template, where that can be found.
        """
        return self._run(values, lambda pieces: self._env.joined(list(pieces)))

    def generated(self, values: dict[str, Any]) -> list[tuple[int, int]]:
        """Where in the text the {% generation %} blocks begin and end."""
        blocks: list[str] = []
        found: list[tuple[int, int]] = []

        def write(pieces: Iterator[str]) -> None:
            for piece in pieces:
                self._env.take(len(piece))
                blocks.append(piece)

        with self._env.activate_tracker(blocks, found):  # type: ignore[attr-defined]
            self._run(values, write)
        return found

    def _run(self, values: dict[str, Any], write: Callable[[Iterator[str]], T]) -> T:
        env, template = self._env, self._template
        env.begin(values)
        given = {**self._names, **values}
        context = env.context_class(env, given, template.name, template.blocks)
        try:
            return write(template.root_render_func(context))
        except LimitReached as limit:
            what = f"{limit}{self._line(limit)}"
        # Outside: the error above holds all that the template has made.
        raise LimitReached(what)

    def _line(self, limit: LimitReached) -> str:
        place, found = limit.__traceback__, 0
        while place:
            if "__jinja_template__" in place.tb_frame.f_globals:
                found = self._template.get_corresponding_lineno(place.tb_lineno)
            place = place.tb_next
        return f" (its line {found})" if found else ""


@functools.cache
def _plain_environment() -> Any:
    """Transformers' own, of an empty template: the foreign one is never compiled in it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment
