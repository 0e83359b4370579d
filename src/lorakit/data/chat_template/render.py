"""Render turns with a chat template to text and token ids, and detect template capabilities.

Capabilities are detected by rendering probes, not by parsing the template: the token after an
answer, support for a system turn and for tools, and whether the tokenizer puts a BOS before a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lorakit.data.chat_template.program import Program
from lorakit.data.chat_template.sandbox import LimitReached
from lorakit.data.chat_template.thoughts import CLOSE_TAG, OPEN_TAG, split_thoughts
from lorakit.errors import DataError, LorakitError, ModelError
from lorakit.types import Message

# Texts of the probes: the question, the answer, the system text.
PROBE_USER, PROBE_ASSISTANT, PROBE_SYSTEM = "Q7qzx", "A7qzx", "S7qzx"
_THOUGHTS = "H7qzx"
# Texts of the tool probes: description, name and value of an argument, result.
_PURPOSE, _KEY, _VALUE, _RESULT = "T7qzx", "k7qzx", "v7qzx", "R7qzx"
# A block around the model's own output, by which a template marks the tokens to train.
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Texts meant to be one token: <|im_end|>, <end_of_turn>.
_MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_turn>")
_THINK_TAG = re.compile("</?think>")
# Two private planes of Unicode: one replaces special tokens that occur as text in a turn.
_PRIVATE = (0xF0000, 0x100000)
_NOTHING = re.compile(r"(?!)")
_ASK = {"role": "user", "content": PROBE_USER}
_ANSWER = {"role": "assistant", "content": PROBE_ASSISTANT}


class TemplateRefusal(DataError):
    """The chat template raised on these turns, or cannot be applied to them."""


@dataclass(frozen=True, slots=True)
class TemplateCapabilities:
    """Capabilities of a tokenizer and its template, detected by rendering probes."""

    template: str
    stops: tuple[int, ...]
    stop_texts: tuple[str, ...]
    turn_end: str  # beginning of the next turn, if that ends an answer
    call_end: str  # beginning of the next turn, if that ends a tool call
    merges_system_into_user: bool
    bos_id: int | None  # set if the tokenizer puts a BOS before a text
    specials: re.Pattern[str] | None
    special_texts: tuple[str, ...]
    has_generation_blocks: bool  # marks the model's output with {% generation %}
    arguments_as_text: bool  # of tool calls; most templates take an object
    unsupported: tuple[str, ...]  # tool schemas, calls or results that the template omits
    splits_tags: bool  # looks for </think> in an answer
    thoughts: ThoughtsFormat | None  # how `reasoning_content` is written, if it is
    prompt_fits: bool  # a plain answer begins with the generation prompt
    stripping: tuple[str, ...]  # tokens that remove the white space after them (Phi-3)


@dataclass(frozen=True, slots=True)
class ThoughtsFormat:
    """Texts that a template writes around the thoughts of an answer."""

    opening: str
    closing: str


_KNOWN: WeakKeyDictionary[Any, TemplateCapabilities] = WeakKeyDictionary()


def template_capabilities(tokenizer: Any) -> TemplateCapabilities:
    """Detect the capabilities of `tokenizer`; cached until its template changes."""
    template = str(tokenizer.chat_template)
    cached = _KNOWN.get(tokenizer)
    if cached is not None and cached.template == template:
        return cached
    special = {str(t) for t in tokenizer.all_special_tokens}
    special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= _turn_marks(tokenizer)
    texts = tuple(sorted(special - {""}, key=lambda t: (-len(t), t)))
    tools = _probe_tools(tokenizer)
    stops, closer = _stop_texts(tokenizer)
    # gpt-oss closes a call with <|call|>, an answer with <|return|>.
    call_closer = tools.closer if closer else ""
    others = [t for t in (tools.stop, call_closer.strip()) if t]
    stops = tuple(dict.fromkeys((*stops, *others))) if stops else stops
    first = tokenizer.encode("")[:1]
    adds_bos = bool(first) and first == [tokenizer.bos_token_id]
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    capabilities = TemplateCapabilities(
        template=template,
        stops=tuple(dict.fromkeys(i for i in ids if i is not None)),
        stop_texts=stops,
        turn_end=closer,
        call_end=call_closer,
        merges_system_into_user=_refuses_system(tokenizer),
        bos_id=tokenizer.bos_token_id if adds_bos else None,
        specials=re.compile("|".join(re.escape(t) for t in texts)) if texts else None,
        special_texts=texts,
        has_generation_blocks=bool(_GENERATION.search(template)),
        arguments_as_text=tools.as_text,
        unsupported=tools.unwritten,
        splits_tags=CLOSE_TAG in template,
        thoughts=_probe_thoughts(tokenizer),
        prompt_fits=_prompt_fits(tokenizer),
        stripping=tuple(str(t) for t in tokenizer.added_tokens_decoder.values() if t.rstrip),
    )
    _KNOWN[tokenizer] = capabilities
    return capabilities


def _stop_texts(tokenizer: Any) -> tuple[tuple[str, ...], str]:
    """Special token that the template writes after an answer, if any, and `turn_end`."""
    if not tokenizer.chat_template:
        return ((tokenizer.eos_token,) if tokenizer.eos_token else ()), ""
    chat = [_ASK, _ANSWER]
    tail = render_chat(tokenizer, chat, prompt=False).rpartition(PROBE_ASSISTANT)[2]
    token_texts = {str(t): None for t in tokenizer.added_tokens_decoder.values()}
    token_texts |= {str(t): None for t in tokenizer.all_special_tokens}
    longest_first = sorted(filter(None, token_texts), key=lambda t: -len(t))
    ends = _leading_tokens(tail.lstrip(), longest_first)
    # Command R7B closes with <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, and engines stop at the second.
    stop = tokenizer.eos_token if tokenizer.eos_token in ends else "".join(ends[:1])
    if stop or tail.strip():
        return ((stop,) if stop else ()), ""
    # GLM-4: <|user|>ask<|assistant|>say<|user|>: the role token of the next turn ends an answer.
    try:
        text = render_chat(
            tokenizer, [*chat, {"role": "user", "content": PROBE_SYSTEM}], prompt=False
        )
    except TemplateRefusal:
        return (), ""
    question, _, after = text.rpartition(PROBE_ASSISTANT)
    opening = [t for t in longest_first if t in question.partition(PROBE_USER)[2]]
    # GLM-4.5 writes <think></think> before an answer without thoughts.
    opening = [t for t in opening if t not in (OPEN_TAG, CLOSE_TAG)]
    ends = _leading_tokens(after.lstrip(), longest_first)[:1]
    # Templates with more than one token per role (<|im_start|>assistant) lack an end of turn.
    if not ends or len(opening) != 1 or ends[0] in (*opening, tokenizer.bos_token):
        return (), ""
    return tuple(ends), after[len(tail) : after.index(ends[0]) + len(ends[0])]


def _leading_tokens(text: str, longest_first: Sequence[str]) -> list[str]:
    """Tokens at the beginning of a text, with nothing between them."""
    found: list[str] = []
    while token := next((t for t in longest_first if text.startswith(t)), ""):
        found.append(token)
        text = text[len(token) :]
    return found


def _turn_marks(tokenizer: Any) -> set[str]:
    """Added tokens that the template writes around turns and that are not declared special.

    DeepSeek's <｜User｜> and <｜Assistant｜>: in the text of a turn they must not begin a turn.
    """
    if not tokenizer.chat_template:
        return set()
    try:
        text = render_chat(tokenizer, [_ASK, _ANSWER, _ASK], prompt=True)
    except TemplateRefusal:
        return set()
    added = (str(t) for t in tokenizer.added_tokens_decoder.values() if not t.special)
    return {t for t in added if t[:1] in "<[｜" and t in text and not _THINK_TAG.fullmatch(t)}


def _probe_thoughts(tokenizer: Any) -> ThoughtsFormat | None:
    """Detect whether and how the template writes the `reasoning_content` of an answer."""
    if not tokenizer.chat_template:
        return None
    answer = {**_ANSWER, "reasoning_content": _THOUGHTS}
    for options in ({}, {"enable_thinking": True}):
        try:
            text = render_chat(tokenizer, [_ASK, answer], prompt=False, **options)
            plain = render_chat(tokenizer, [_ASK, _ANSWER], prompt=False, **options)
        except TemplateRefusal:
            return None
        before, thoughts, after = text.partition(_THOUGHTS)
        if thoughts and PROBE_ASSISTANT in after:
            # What both begin with, up to the end of a token: <|channel>thought, not the role.
            start = before.rfind("<", before.find(PROBE_USER) + 1)
            shared = shared_length(before, plain)
            opening = before[shared:] or before[start:]
            return ThoughtsFormat(opening, after.partition(PROBE_ASSISTANT)[0])
    return None


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of characters or ids with which two sequences begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _prompt_fits(tokenizer: Any) -> bool:
    """True if a plain answer begins with the generation prompt."""
    if not tokenizer.chat_template:
        return True
    try:
        answered = render_chat(tokenizer, [_ASK, _ANSWER], prompt=False)
        return answered.startswith(render_chat(tokenizer, [_ASK], prompt=True))
    except TemplateRefusal:
        return False


@dataclass(frozen=True, slots=True)
class _ToolCapabilities:
    as_text: bool = False
    unwritten: tuple[str, ...] = ()
    stop: str = ""  # the last special token after a call
    closer: str = ""  # beginning of a result


def _probe_tools(tokenizer: Any) -> _ToolCapabilities:
    """Detect how the template writes tools.

    If the template raises on a probe, tools count as supported and are checked in each row.
    """
    if not tokenizer.chat_template:
        return _ToolCapabilities()
    schema = {"type": "object", "properties": {"q": {"type": "string", "description": "query"}}}
    function = {"name": "find", "description": _PURPOSE, "parameters": schema}
    tools = [{"type": "function", "function": function}]

    def rendered(chat: list[dict[str, Any]]) -> str | None:
        try:
            return render_chat(tokenizer, chat, prompt=False, tools=tools)
        except TemplateRefusal:
            return None

    ask, call = _ASK, _probe_call(as_text=False)
    text = rendered([ask, call])
    as_text = not _writes_call(text) and _writes_call(rendered([ask, _probe_call(as_text=True)]))
    if as_text:
        call = _probe_call(as_text=True)
        text = rendered([ask, call])
    result = {"role": "tool", "content": _RESULT, "tool_call_id": "call7qzx0", "name": "find"}
    with_result = rendered([ask, call, result])
    written = {
        "tool schemas": _PURPOSE in (rendered([ask]) or _PURPOSE),
        "tool calls": text is None or _writes_call(text),
        "tool results": _RESULT in (with_result or _RESULT),
    }
    turn = (text or "").partition(PROBE_USER)[2]
    specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} - {""}
    stop = max((s for s in specials if s in turn), key=turn.rfind, default="")
    # Gemma 4 writes <|"|> around every text of a call: such a token does not end the call.
    ends = _VALUE in turn and turn.count(stop) == 1 and turn.find(stop) > turn.find(_VALUE)
    stop = stop if ends else ""
    closer = ""
    if text and with_result and with_result.startswith(text):
        after = with_result[len(text) :]
        token = next((s for s in specials if after.lstrip().startswith(s)), "")
        closer = after[: after.index(token) + len(token)] if token else ""
    unwritten = tuple(name for name, present in written.items() if not present)
    return _ToolCapabilities(as_text, unwritten, stop, closer)


def _probe_call(as_text: bool) -> dict[str, Any]:
    arguments: Any = {_KEY: _VALUE}
    function = {"name": "find", "arguments": json.dumps(arguments) if as_text else arguments}
    # Mistral's template requires ids of nine letters and digits.
    call = {"id": "call7qzx0", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _writes_call(text: str | None) -> bool:
    """True if the call is written, and not as a Python repr ('k) or as JSON in JSON (\\"k)."""
    if text is None or f"'{_KEY}" in text or f'\\"{_KEY}' in text:
        return False
    return _KEY in text and _VALUE in text


def unknown_marks(tokenizer: Any) -> list[str]:
    """Find texts such as <|im_start|> that the template writes and the tokenizer lacks."""
    chat = [_ASK, _ANSWER]
    marks = dict.fromkeys(_MARK.findall(render_chat(tokenizer, chat, prompt=False)))
    return [mark for mark in marks if len(tokenizer(mark, add_special_tokens=False).input_ids) > 1]


def _refuses_system(tokenizer: Any) -> bool:
    if not tokenizer.chat_template:
        return False
    chat = [{"role": "system", "content": PROBE_SYSTEM}, {"role": "user", "content": PROBE_USER}]
    try:
        return PROBE_SYSTEM not in render_chat(tokenizer, chat, prompt=True)
    except TemplateRefusal:
        return True


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids at which generation stops: the template's end of turn, eos, and the model's."""
    stops = [*template_capabilities(tokenizer).stops, tokenizer.eos_token_id]
    eos = getattr(generation_config, "eos_token_id", None)
    stops += eos if isinstance(eos, list | tuple) else [eos]
    return list(dict.fromkeys(int(i) for i in stops if i is not None))


# -- texts and tokens -----------------------------------------------------------------------------


class SpecialTokenEscaper:
    """Escapes special tokens that occur as text in a turn, so that they stay plain text.

    A user who writes "<|im_end|>" must not end a turn. Such texts are replaced by private
    characters while the template renders, and are tokenized as plain text.
    """

    def __init__(
        self,
        capabilities: TemplateCapabilities,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._marks: dict[str, str] = {}
        self._capabilities = capabilities
        self._tools = tools
        texts = [m.content for m in messages]
        texts += [*_texts([m.extra for m in messages if m.extra]), *_texts(list(tools))]
        specials = capabilities.specials
        tags = any(self._mentions_tags(m) for m in messages)
        if not tags and not (specials and any(specials.search(t) for t in texts)):
            return
        hidden = (*capabilities.special_texts, OPEN_TAG, CLOSE_TAG)
        count = len(hidden)
        for base in _PRIVATE:
            if not any(base <= ord(char) < base + count for t in texts for char in t):
                break
        else:
            raise TemplateRefusal("a turn contains characters of both private planes of Unicode")
        self._marks = {text: chr(base + i) for i, text in enumerate(hidden)}
        self._texts = {mark: text for text, mark in self._marks.items()}
        self._pattern = specials or _NOTHING

    @property
    def active(self) -> bool:
        """True if a turn contains a special token as text."""
        return bool(self._marks)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Convert the turns to the form that the template takes."""
        turns = [self._turn(m) for m in messages]
        if self._capabilities.arguments_as_text:
            for call in (c["function"] for m in turns for c in m.get("tool_calls", ())):
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        if (
            self._capabilities.merges_system_into_user
            and len(turns) > 1
            and turns[0]["role"] == "system"
        ):
            system, first, *rest = turns
            joined = f"{system['content'].strip()}\n\n{first['content']}"
            return [{**first, "content": joined}, *rest]
        return turns

    def _turn(self, message: Message) -> dict[str, Any]:
        """Convert a turn; thoughts in the text of an answer go where the template reads them."""
        turn = message.as_dict()
        if message.role != "assistant" or "think>" not in message.content:
            return self._hide(turn) if message.extra or self._marks else turn
        thoughts, rest = split_thoughts(message.content)
        tagged = ""
        if thoughts is not None and self._capabilities.thoughts:
            turn["reasoning_content"] = turn.get("reasoning_content") or thoughts
        elif thoughts is not None:
            tagged = message.content[: len(message.content) - len(rest)]
        turn["content"] = ""
        turn = self._hide(turn)
        turn["content"] = tagged + self._hide(self._without_tags(rest))
        return turn

    def _mentions_tags(self, message: Message) -> bool:
        """True for an answer whose text besides its thoughts holds <think> or </think>."""
        if message.role != "assistant" or not self._capabilities.splits_tags:
            return False
        return bool(_THINK_TAG.search(split_thoughts(message.content)[1]))

    def _without_tags(self, text: str) -> str:
        """Hide the tags that an answer only mentions, at which the template would cut it."""
        if not self._marks or not self._capabilities.splits_tags:
            return text
        return _THINK_TAG.sub(lambda match: self._marks[match.group()], text)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Schemas of the functions in the form that the template takes."""
        return [self._hide(tool) for tool in self._tools] or None

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str) and self._marks:
            return self._pattern.sub(lambda match: self._marks[match.group()], value)
        if isinstance(value, Mapping):
            return {self._hide(k): self._hide(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(v) for v in value]
        return value

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """Split text into (text, is an escaped special token) pairs in order."""
        if not self._marks:
            return [(text, False)]
        split = re.split("([" + "".join(self._texts) + "])", text)
        return [(self._texts.get(piece, piece), piece in self._texts) for piece in split if piece]


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, keys included."""
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
    """Render `messages` to text.

    Args:
        prompt: add the generation prompt for the next answer.
        options: further names for the template, such as `tools`.

    Raises:
        TemplateRefusal: the template raised.
        ModelError: the template exceeded its limits on time or memory.
    """
    values = {**options, "messages": _aliased(messages), "add_generation_prompt": prompt}
    try:
        return _program(tokenizer).render(values)
    # A template is a program of the model's author and may raise anything.
    except Exception as error:
        raise _refusal(tokenizer, error) from error


def generated_parts(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any
) -> list[tuple[int, int]]:
    """Character ranges of the {% generation %} blocks in the text of `messages`."""
    values = {"messages": _aliased(messages), "tools": tools, "add_generation_prompt": False}
    try:
        return _program(tokenizer).generated(values)
    except Exception as error:
        raise _refusal(tokenizer, error) from error


# Tokenizer -> its template and the compiled program.
_PROGRAMS: WeakKeyDictionary[Any, tuple[str, Program]] = WeakKeyDictionary()


def _program(tokenizer: Any) -> Program:
    template = tokenizer.chat_template
    cached = _PROGRAMS.get(tokenizer)
    if not isinstance(template, str):
        raise ValueError("the tokenizer has no template, or several and none was chosen")
    if cached is None or cached[0] != template:
        cached = template, Program(template, tokenizer.special_tokens_map)
        _PROGRAMS[tokenizer] = cached
    return cached[1]


def _aliased(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy thoughts to the key that gpt-oss' template reads, as `apply_chat_template` does."""
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
    """Convert to a fault of the row, or of the model if the template exceeded its limits."""
    if isinstance(error, LimitReached):
        return ModelError(
            f"{_template_file(tokenizer)}: this chat template was stopped: it {error}",
            hint="no published model needs that: take the template that came with the model, and "
            "do not trust the source of this one",
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
    """Tokenize a rendered text to ids [T], with a BOS if the tokenizer adds one to texts.

    Args:
        inside: the text continues another one, without a BOS.
        known: ids of texts that are already tokenized.
    """
    ids: list[int] = []
    if known and text in known:
        ids += known[text]
    else:
        for piece, plain in guard.pieces(text) if guard else [(text, False)]:
            if plain:
                ids += _plain_ids(tokenizer, piece)
            else:
                ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    bos = None if inside else template_capabilities(tokenizer).bos_id
    return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids


# Tokenizer -> a copy of its Rust tokenizer without added tokens.
_PLAIN: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _plain_ids(tokenizer: Any, token: str) -> list[int]:
    """Tokenize the text of an added token as ordinary text."""
    options = {"add_special_tokens": False, "verbose": False, "split_special_tokens": True}
    ids: list[int] = tokenizer(token, **options)["input_ids"]
    if tokenizer.get_added_vocab().get(token) not in ids or not tokenizer.is_fast:
        return ids
    # `split_special_tokens` leaves added tokens that are not special as they are.
    if tokenizer not in _PLAIN:
        backend = tokenizer.backend_tokenizer
        values = json.loads(backend.to_str()) | {"added_tokens": []}
        _PLAIN[tokenizer] = type(backend).from_str(json.dumps(values))
    return list(_PLAIN[tokenizer].encode(token, add_special_tokens=False).ids)
