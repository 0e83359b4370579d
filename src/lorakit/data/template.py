"""Conversations enter; token ids and labels leave. The one place where prompts and masks are made.

The tokenizer's own chat template is the only truth. An answer's span is what the template writes
between the prompt it would give at inference and the end-of-turn token, that token included; so
chat, evaluation and serving see exactly the ids that stood before a trained answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from lorakit.data.check import FaultLog
from lorakit.data.formats import UnusableRow
from lorakit.errors import DataError
from lorakit.records import IGNORE, Conversation, Example, Message, Origin

# Meta's format for Llama-2-chat, whose early tokenizers shipped without a template.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# For base models: no special tokens but the end of text, which every tokenizer has.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### User:\\n' + m['content'] + '\\n\\n### Assistant:\\n' }}"
    "{% else %}{{ m['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
)


def resolve_template(tokenizer: Any, model_name: str) -> str:
    """Make sure the tokenizer has a chat template; returns where it came from, for the report.

    Raises:
        DataError: the template writes no end-of-turn token, or two BOS.
    """
    if getattr(tokenizer, "chat_template", None):
        source = "the model's own"
    elif "llama-2" in model_name.lower() or "llama2" in model_name.lower():
        tokenizer.chat_template = LLAMA_2
        source = "Llama-2's, because the tokenizer has none"
    else:
        tokenizer.chat_template = PLAIN
        source = "a plain one (### User / ### Assistant), because the tokenizer has none"
    probe = Conversation((Message("user", "a"), Message("assistant", "b")), Origin("template", 1))
    encode(tokenizer, probe, "responses", 1_000_000, "error")
    return source


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids that ask for the next answer: what inference feeds the model.

    Raises:
        UnusableRow: the template refuses these turns.
    """
    return _tokenize(tokenizer, _render(tokenizer, messages, prompt=True))[0]


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids that end an answer: what the template writes after one, eos, and the model's own list."""
    probe = [Message("user", "a"), Message("assistant", "b")]
    ids, offsets = _tokenize(tokenizer, _render(tokenizer, probe, prompt=False))
    start = len(_render(tokenizer, probe[:1], prompt=True))
    found = [ids[_end_of_turn(tokenizer, ids, offsets, start, Origin("template", 1))]]
    more = getattr(generation_config, "eos_token_id", None)
    found += more if isinstance(more, list) else [more]
    found.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(i for i in found if i is not None))


def encode(
    tokenizer: Any,
    conversation: Conversation,
    train_on: str,
    cutoff_len: int,
    too_long: str,
    log: FaultLog | None = None,
) -> list[Example]:
    """One conversation as one example, or one per answer where the template rewrites the past.

    Args:
        train_on: "responses", "last" or "all", see Recipe.
        cutoff_len: longest example in tokens; an answer is never cut.
        too_long: "drop_oldest_turns", "drop" or "error".
        log: receives a fault when old turns were dropped.

    Raises:
        UnusableRow: the row cannot be trained (too long, refused by the template, forged tokens).
        DataError: the template itself is unfit: no end-of-turn token, two BOS; or too_long=error.
    """
    _refuse_special_text(tokenizer, conversation)
    messages, dropped = conversation.messages, False
    while True:
        examples = _encode_turns(tokenizer, messages, train_on, conversation.origin)
        longest = max(len(e.input_ids) for e in examples)
        if longest <= cutoff_len:
            break
        shorter = _without_oldest(messages)
        if too_long == "error":
            raise DataError(
                f"{conversation.origin}: {longest} tokens, cutoff_len is {cutoff_len}",
                hint="raise cutoff_len, or set too_long: drop_oldest_turns",
            )
        if too_long == "drop" or shorter is None:
            raise UnusableRow(f"longer than cutoff_len ({cutoff_len} tokens)")
        messages, dropped = shorter, True
    if dropped and log is not None:
        log.add("oldest turns dropped to fit cutoff_len", conversation.origin, "shortened")
    return examples


def _encode_turns(
    tokenizer: Any, messages: Sequence[Message], train_on: str, origin: Origin
) -> list[Example]:
    last = max(i for i, m in enumerate(messages) if m.role == "assistant")
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    wanted = [last] if train_on == "last" else answers
    text = _render(tokenizer, messages[: last + 1], prompt=False)
    spans = [_span(tokenizer, messages, i) for i in wanted]
    if all(text.startswith(whole) for _, whole in spans):
        starts = [(len(prompt), len(whole)) for prompt, whole in spans]
        return [_example(tokenizer, text, starts, train_on, origin)]
    # The template rewrites earlier turns (Qwen3 drops their thinking): as at inference, each answer
    # is then an example of its own.
    return [
        _example(tokenizer, whole, [(len(prompt), len(whole))], train_on, origin)
        for prompt, whole in spans
    ]


def _span(tokenizer: Any, messages: Sequence[Message], index: int) -> tuple[str, str]:
    """The prompt before answer `index`, and the text up to and with it."""
    prompt = _render(tokenizer, messages[:index], prompt=True)
    whole = _render(tokenizer, messages[: index + 1], prompt=False)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template writes another prompt in training than at inference "
            f"(training has {whole[: len(prompt)][-40:]!r}, inference {prompt[-40:]!r})",
            hint="report this model; its template cannot be trained faithfully",
        )
    return prompt, whole


def _example(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], train_on: str, origin: Origin
) -> Example:
    ids, offsets = _tokenize(tokenizer, text)
    if any(a < start < b for start, _ in spans for a, b in offsets):
        # A token crosses the border of prompt and answer: inference would never produce it.
        borders = sorted({0, len(text), *(s for s, _ in spans)})
        ids, offsets = _tokenize_pieces(tokenizer, text, borders)
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        last = _end_of_turn(tokenizer, ids, offsets, start, origin, end)
        for i, (a, _) in enumerate(offsets[: last + 1]):
            if a >= start:
                labels[i] = ids[i]
    if train_on == "all":
        labels = list(ids)
    labels[0] = IGNORE
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(
            f"{origin}: the text begins with two BOS tokens ({tokenizer.bos_token})",
            hint="the chat template writes one too many",
        )
    return Example(ids, labels, origin)


def _end_of_turn(
    tokenizer: Any,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    start: int,
    origin: Origin,
    end: int | None = None,
) -> int:
    """Index of the last special token between the characters `start` and `end`: the answer's end."""
    special = _special_ids(tokenizer)
    for i in reversed(range(len(ids))):
        a, b = offsets[i]
        if a >= start and (end is None or b <= end) and ids[i] in special:
            return i
    raise DataError(
        f"{origin}: the chat template writes no end-of-turn token after an answer, "
        "so the model would never learn to stop",
        hint="use the model's original template; it must close an assistant turn with a special token",
    )


def _tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of rendered text with their character spans; BOS once, whether template or tokenizer adds it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    bos = tokenizer.bos_token
    if bos and not text.startswith(bos) and _adds_bos(tokenizer):
        ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    return ids, offsets


def _tokenize_pieces(
    tokenizer: Any, text: str, borders: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in zip(borders, borders[1:], strict=False):
        piece = tokenizer(
            text[start:end], add_special_tokens=False, return_offsets_mapping=True
        )
        ids += piece["input_ids"]
        offsets += [(a + start, b + start) for a, b in piece["offset_mapping"]]
    if tokenizer.bos_token and not text.startswith(tokenizer.bos_token) and _adds_bos(tokenizer):
        ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    return ids, offsets


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def _render(tokenizer: Any, messages: Sequence[Message], prompt: bool) -> str:
    """The template's text. A template that refuses a system turn gets it inside the first question."""
    turns = [m.as_dict() for m in messages]
    try:
        return _apply(tokenizer, turns, prompt)
    except TemplateError as error:
        if len(turns) > 1 and turns[0]["role"] == "system":
            folded = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
            try:
                return _apply(tokenizer, [folded, *turns[2:]], prompt)
            except TemplateError:
                pass
        raise UnusableRow(f"the chat template refuses it ({str(error)[:80]})") from error


def _apply(tokenizer: Any, turns: list[dict[str, str]], prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))


def _without_oldest(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The conversation without its first question and answer; None when only one is left."""
    head = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    answers = [i for i, m in enumerate(turns) if m.role == "assistant"]
    if len(answers) < 2:
        return None
    return (*head, *turns[answers[0] + 1 :])


def _refuse_special_text(tokenizer: Any, conversation: Conversation) -> None:
    """Text that spells a control token would become one, and forge turns."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    spellings = [t.content for t in added.values() if t.special and len(t.content) > 2]
    for message in conversation.messages:
        for spelling in spellings:
            if spelling in message.content:
                raise UnusableRow(f"text that spells the control token {spelling}")
