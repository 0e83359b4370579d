"""Encode conversations and documents to token ids and loss masks.

Loss masks of conversations are made here alone. The text is always that of the tokenizer's chat
template, in which `data/tokenize/spans.py` finds the answers. The ids before an answer, which chat
and evaluation feed the model, must be a prefix of the training ids: if the template or the
tokenizer breaks that, an answer becomes a separate example, and is tokenized separately from its
prompt.

Shapes: T tokens.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data.chat_template.render import (
    SpecialTokenEscaper,
    render_chat,
    template_capabilities,
    to_ids,
)
from lorakit.data.chat_template.render import stop_token_ids as stop_token_ids
from lorakit.data.chat_template.select import TemplateInfo as TemplateInfo
from lorakit.data.chat_template.select import resolve_template as resolve_template
from lorakit.data.issues import FatalRowError, IssueLog, RowError
from lorakit.data.tokenize.batch_tokenizer import (
    borders_of,
    indices_of,
    tokenize_in_background,
)
from lorakit.data.tokenize.documents import as_instructions, encode_document
from lorakit.data.tokenize.example_checks import verify_example
from lorakit.data.tokenize.pairs import encode_pairs
from lorakit.data.tokenize.spans import Draft, Span, find_spans
from lorakit.data.tokenize.truncate import split_conversation
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import IGNORE, Conversation, Document, Example, Message

BLOCK, BLOCK_CHARS = 2048, 2**22


@dataclass(frozen=True, slots=True)
class EncodeConfig:
    """Settings of a recipe for masks and lengths.

    `longest_prompt`: of prompts alone, without their answers; None for complete conversations.
    """

    train_on: str
    cutoff_len: int
    on_overlength: str
    documents: str = "completion"
    overlap: int = 0
    train_on_thoughts: bool = True
    longest_prompt: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> EncodeConfig:
        """Take the settings from a recipe."""
        return cls(
            recipe.train_on,
            recipe.cutoff_len,
            recipe.on_overlength,
            recipe.documents,
            recipe.document_overlap,
            recipe.train_on_thoughts,
            recipe.longest_prompt if recipe.objective == "grpo" else None,
        )


def _blocks(items: Iterable[Conversation | Document]) -> Iterator[list[Conversation | Document]]:
    """Group items into blocks, large enough to tokenize in a batch and small enough for memory."""
    block, size = [], 0
    for item in items:
        block.append(item)
        size += len(item.text) if isinstance(item, Document) else 0
        size += 0 if isinstance(item, Document) else sum(len(m.content) for m in item.messages)
        if len(block) == BLOCK or size > BLOCK_CHARS:
            yield block
            block, size = [], 0
    if block:
        yield block


def prompt_ids(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Encode a conversation with its generation prompt to ids [T], for chat and evaluation.

    Raises:
        DataError: the template refuses these turns.
    """
    guard = SpecialTokenEscaper(template_capabilities(tokenizer), messages, tools)
    text = render_chat(tokenizer, guard.messages(messages), prompt=True, tools=guard.tools)
    return to_ids(tokenizer, text, guard)


def encode(
    tokenizer: Any,
    item: Conversation | Document,
    train_on: str = "responses",
    cutoff_len: int = 2048,
    on_overlength: str = "drop_oldest_turns",
    log: IssueLog | None = None,
) -> list[Example]:
    """Encode one item to one example, or one per answer if the template rewrites old turns.

    Args:
        train_on: "responses" (every answer), "last" (the last one), "all" (every token).
        on_overlength: over `cutoff_len` tokens: "drop_oldest_turns", "split", "drop" or "error". An
            answer is never cut.
        log: counts dropped turns.

    Raises:
        RowError: the row is too long, or the template refuses it: it can be left out.
        FatalRowError: the row would spoil the training (no trained token, no end of turn, double
            BOS), or it is too long and `on_overlength` is "error". The row is named.
    """
    rules = EncodeConfig(train_on, cutoff_len, on_overlength)
    ((_, result),) = encode_many(tokenizer, [item], rules, log or IssueLog())
    if isinstance(result, RowError):
        raise result
    return result


def encode_many(
    tokenizer: Any, items: Iterable[Conversation | Document], rules: EncodeConfig, log: IssueLog
) -> Iterator[tuple[Conversation | Document, list[Example] | RowError]]:
    """Yield each item with its examples, or with the error for which it cannot be used.

    Texts are tokenized in blocks, on all cores, while the next block is rendered. A pair becomes
    one example, see `tokenize/pairs.py`.
    """

    def encode_sides(
        sides: Iterable[Conversation | Document], on_overlength: str, counted: IssueLog
    ) -> Iterator[tuple[Conversation | Document, list[Example] | RowError]]:
        single = replace(rules, on_overlength=on_overlength)
        return _encode_each(tokenizer, sides, single, counted)

    yield from encode_pairs(items, encode_sides, rules.on_overlength, rules.train_on_thoughts, log)


def _encode_each(
    tokenizer: Any, items: Iterable[Conversation | Document], rules: EncodeConfig, log: IssueLog
) -> Iterator[tuple[Conversation | Document, list[Example] | RowError]]:
    """Encode items without pairs."""
    blocks = (
        [(item, _try_draft(tokenizer, item, rules)) for item in block] for block in _blocks(items)
    )
    tail = borders_of(tokenizer).tail

    def texts(block: list[tuple[Conversation | Document, Draft | RowError | None]]) -> list[str]:
        # Texts that contain special tokens as text are tokenized piece by piece.
        drafts = [d for _, d in block if isinstance(d, Draft) and not d.guard.active]
        return [text for d in drafts for text in d.texts(tail)]

    for block, tokenized in tokenize_in_background(tokenizer, blocks, texts):
        for item, drafted in block:
            try:
                yield item, _encode_one(tokenizer, item, drafted, rules, tokenized, log)
            except RowError as fault:
                yield item, fault


# -- one conversation -> ids and mask -------------------------------------------------------------


def _try_draft(
    tokenizer: Any, item: Conversation | Document, rules: EncodeConfig
) -> Draft | RowError | None:
    if isinstance(item, Document) or rules.longest_prompt is not None:
        return None
    try:
        return find_spans(
            tokenizer, item, rules.train_on, rules.train_on_thoughts, may_be_apart=True
        )
    except RowError as fault:
        return fault


def _encode_one(
    tokenizer: Any,
    item: Conversation | Document,
    drafted: Draft | RowError | None,
    rules: EncodeConfig,
    tokenized: Mapping[str, list[int]],
    log: IssueLog,
) -> list[Example]:
    if isinstance(item, Document):
        return _encode_document(tokenizer, item, rules, log)
    if rules.longest_prompt is not None:
        return [_encode_prompt(tokenizer, item, rules.longest_prompt)]
    if not isinstance(drafted, Draft):
        raise drafted or RowError("no answer", item.origin, "nothing to train")
    if drafted.guard.active:
        action = "kept as plain text (trainable_tokens keeps it one token)"
        log.add("special token written in a turn", item.origin, action)
    for kind, action in dict.fromkeys(drafted.notes):
        log.add(kind, item.origin, action)
    if drafted.apart:
        return _encode_apart(tokenizer, drafted, rules, log)
    examples = _examples(tokenizer, drafted, rules.train_on, tokenized)
    long = any(len(example.input_ids) > rules.cutoff_len for _, example in examples)
    # If only the last answer is trained, there is one example, whatever its length.
    if long and rules.on_overlength == "split" and rules.train_on != "last":
        return _encode_pieces(tokenizer, item, rules, log)
    fitting: list[Example] = []
    faults: list[RowError] = []
    for turn, example in examples:
        with _collected(faults):
            if len(example.input_ids) > rules.cutoff_len:
                truncated = replace(item, messages=item.messages[: turn + 1])
                size = f"{len(example.input_ids)} tokens"
                example = _shorten(tokenizer, truncated, rules, size, log)
            fitting.append(example)
    return _checked(tokenizer, item, fitting, faults, rules, log)


def _encode_prompt(tokenizer: Any, item: Conversation, longest: int) -> Example:
    """Encode the turns before the reference answer, as generation begins with them."""
    try:
        ids = prompt_ids(tokenizer, item.messages[:-1], item.tools)
    except DataError as error:
        raise RowError("refused by the template", item.origin, error.message) from error
    if len(ids) > longest:
        raise RowError(
            "prompt too long",
            item.origin,
            f"the prompt has {len(ids)} tokens, expected at most {longest} (cutoff_len minus "
            "max_completion_length, or max_prompt_length)",
            "raise cutoff_len or max_prompt_length",
        )
    return Example(ids, [IGNORE] * len(ids), item.origin)


@contextlib.contextmanager
def _collected(faults: list[RowError]) -> Iterator[None]:
    """Append the fault of an answer, so that the others are still tried; fatal ones are raised."""
    try:
        yield
    except FatalRowError:
        raise
    except RowError as fault:
        faults.append(fault)


def _checked(
    tokenizer: Any,
    item: Conversation,
    fitting: list[Example],
    faults: list[RowError],
    rules: EncodeConfig,
    log: IssueLog,
) -> list[Example]:
    """Check the examples of a conversation, and count its answers that are left out."""
    if not fitting and rules.on_overlength == "drop_oldest_turns" and rules.train_on != "last":
        fitting = _earlier_answers(tokenizer, item, rules, log)
    if not fitting:
        raise faults[0]
    for _ in faults:
        log.add("too long", item.origin, "that answer left out, the others kept")
    for example in fitting:
        verify_example(tokenizer, example, rules.train_on)
    return fitting


def _encode_apart(
    tokenizer: Any, drafted: Draft, rules: EncodeConfig, log: IssueLog
) -> list[Example]:
    """Encode many answers, each with the turns before it that fit, without encoding them all."""
    item, near = drafted.conversation, 0
    fitting: list[Example] = []
    faults: list[RowError] = []

    messages = list(item.messages)
    read_only = [replace(m, train=False) if m.role == "assistant" else m for m in messages]

    def up_to(group: list[int], begin: int = 0) -> Conversation:
        """Return the turns up to the last one of `group`, of which only the group is trained."""
        part = read_only[begin : group[0]] + messages[group[0] : group[-1] + 1]
        return replace(item, messages=tuple(part))

    def parts(group: list[int]) -> list[list[int]]:
        """Split a group if its prompts are no prefix of its ids, as `_examples` does."""
        questions = (i for i in range(group[0], -1, -1) if messages[i].role == "user")
        alone = up_to(group, next(questions, 0))
        drafted = find_spans(tokenizer, alone, rules.train_on, rules.train_on_thoughts)
        one = len(_examples(tokenizer, drafted, rules.train_on, {})) == 1
        return [group] if one else [[turn] for turn in group]

    groups = [part for group in drafted.apart for part in parts(group)]
    if rules.on_overlength == "split":
        whole, _ = _longest_fitting(tokenizer, up_to(groups[-1]), rules, 0, 0)
        if whole > 0:
            return _encode_pieces(tokenizer, item, rules, log)
    for group in groups:
        part = up_to(group)
        near, example = _longest_fitting(tokenizer, part, rules, 0, near)
        with _collected(faults):
            if near > 0 or example is None:
                size = f"more than {rules.cutoff_len} tokens"
                example = _shorten(tokenizer, part, rules, size, log, example)
            fitting.append(example)
    return _checked(tokenizer, item, fitting, faults, rules, log)


def _earlier_answers(
    tokenizer: Any, conversation: Conversation, rules: EncodeConfig, log: IssueLog
) -> list[Example]:
    """Encode a conversation without its last exchange, which alone is too long."""
    messages = conversation.messages
    last = max((i for i, m in enumerate(messages) if m.role == "user"), default=0)
    earlier = replace(conversation, messages=messages[:last])
    if not any(m.role == "assistant" for m in earlier.messages):
        return []
    try:
        drafted = _try_draft(tokenizer, earlier, rules)
        return _encode_one(tokenizer, earlier, drafted, rules, {}, log)
    except FatalRowError:
        raise
    except RowError:
        return []


def _encode_pieces(
    tokenizer: Any, conversation: Conversation, rules: EncodeConfig, log: IssueLog
) -> list[Example]:
    """Encode a conversation in pieces that fit; each answer is trained in one of them."""
    single = replace(rules, on_overlength="drop")

    def tried(piece: Conversation) -> tuple[list[Example], RowError | None]:
        try:
            piece_log, drafted = (
                IssueLog(),
                find_spans(tokenizer, piece, rules.train_on, rules.train_on_thoughts),
            )
            examples = _encode_one(tokenizer, piece, drafted, single, {}, piece_log)
            lost = any(fault.kind == "too long" for fault in piece_log.faults())
            error = RowError("too long", piece.origin, "an answer would be left out")
            return examples, error if lost else None
        except FatalRowError:
            raise
        except RowError as fault:
            return [], fault

    def fits(piece: Conversation) -> bool:
        fault = tried(piece)[1]
        # A piece may hold only answers marked train: false; with others they are context.
        return fault is None or fault.kind == "no trained answer"

    encoded: list[Example] = []
    faults: list[RowError] = []
    for piece in split_conversation(conversation, fits):
        piece_examples, fault = tried(piece)
        encoded += piece_examples
        if fault is not None and fault.kind != "no trained answer":
            faults.append(fault)
    if not encoded:
        raise faults[0]
    log.add("too long", conversation.origin, "split into several examples")
    for _ in faults:
        log.add("too long", conversation.origin, "that answer left out, the others kept")
    return encoded


def _encode_document(
    tokenizer: Any, document: Document, rules: EncodeConfig, log: IssueLog
) -> list[Example]:
    """Encode a text as it is, or as requests and answers, in pieces that fit."""
    overlap = min(rules.overlap, rules.cutoff_len // 4)
    if rules.documents == "completion":
        return encode_document(tokenizer, document, rules.cutoff_len, overlap, log)
    single, limit = replace(rules, on_overlength="drop"), rules.cutoff_len - overlap
    fault = RowError("too long", document.origin, f"no text fits cutoff_len {rules.cutoff_len}")
    while limit > 1 and fault.kind == "too long":
        # The tokens of request and template are known only after encoding: retry with less text.
        limit = limit * 3 // 4
        chats, chat_log = as_instructions(tokenizer, document, limit, overlap), IssueLog()
        examples: list[Example] = []
        for _, result in encode_many(tokenizer, chats, single, chat_log):
            if isinstance(result, RowError):
                fault = result
                break
            examples += result
        else:
            log.merge(chat_log)
            return examples
    raise fault


def _examples(
    tokenizer: Any, drafted: Draft, train_on: str, tokenized: Mapping[str, list[int]]
) -> list[tuple[int, Example]]:
    """Make (turn of the last answer, example) pairs, of any length."""
    pairs = []
    guard, borders = drafted.guard, borders_of(tokenizer)
    for group in drafted.groups:
        text = group[0].text
        ids = to_ids(tokenizer, text, guard, known=tokenized)
        tails = [
            to_ids(tokenizer, borders.tail(text, s.start), guard, inside=True, known=tokenized)
            for s in group
        ]
        starts = borders.prompt_lengths(ids, text, [s.start for s in group], tails)
        known_starts = [at for at in starts if at is not None]
        if len(known_starts) == len(group):
            pairs.append(_masked(tokenizer, drafted, group, ids, known_starts, train_on, tokenized))
            continue
        for span in group:
            ids = to_ids(tokenizer, text[: span.end], guard, known=tokenized)
            prompt = to_ids(tokenizer, text[: span.start], guard)
            if ids[: len(prompt)] != prompt:
                # A token across the border (": " + "Paris") never occurs in generation, so the
                # answer is tokenized separately.
                rest = text[span.start : span.end]
                ids = prompt + to_ids(tokenizer, rest, guard, inside=True)
            pairs.append(
                _masked(tokenizer, drafted, [span], ids, [len(prompt)], train_on, tokenized)
            )
    return pairs


def _masked(
    tokenizer: Any,
    drafted: Draft,
    spans: Sequence[Span],
    ids: list[int],
    starts: Sequence[int],
    train_on: str,
    tokenized: Mapping[str, list[int]],
) -> tuple[int, Example]:
    """Train each answer from its start to its first stop token, by position, not by id."""
    origin, guard = drafted.conversation.origin, drafted.guard
    text, borders = spans[-1].text[: spans[-1].end], borders_of(tokenizer)
    stops = template_capabilities(tokenizer).stops
    ends = sorted(i + 1 for stop in stops for i in indices_of(ids, stop))
    tail_index = borders.tail_index(ids, text)

    def end(start: int) -> int:
        following = bisect_right(ends, start)
        if following == len(ends):
            raise FatalRowError(
                "no end of turn", origin, "an answer has no end-of-turn token among its tokens"
            )
        return ends[following]

    def tokens_before(at: int) -> int:
        """Count tokens of `ids` up to `text[:at]`, without one that extends beyond it."""
        begin = tail_index(at)
        tail = text[:at] if begin is None else borders.tail(text, at)
        other = to_ids(tokenizer, tail, guard, inside=begin is not None, known=tokenized)
        begin = begin or 0
        pairs = enumerate(zip(ids[begin : begin + len(other)], other, strict=False))
        return begin + next((i for i, (a, b) in pairs if a != b), min(len(ids) - begin, len(other)))

    labels = [IGNORE, *ids[1:]] if train_on == "all" else [IGNORE] * len(ids)
    if train_on != "all":
        for start in starts:
            labels[start : end(start)] = ids[start : end(start)]
        for gap in (gap for span in spans for gap in span.gaps):
            begin, until = map(tokens_before, gap)
            labels[begin:until] = [IGNORE] * (until - begin)
    for span in drafted.untrained:
        start = tokens_before(span.start)
        labels[start : end(start)] = [IGNORE] * (end(start) - start)
    return spans[-1].turn, Example(ids, labels, origin)


def _shorten(
    tokenizer: Any,
    conversation: Conversation,
    rules: EncodeConfig,
    size: str,
    log: IssueLog,
    shortened: Example | None = None,
) -> Example:
    """Drop as few of the oldest exchanges as needed to fit; the system turn is kept.

    Args:
        shortened: the result, if it is known.
    """
    origin, size = conversation.origin, f"{size}, over cutoff_len {rules.cutoff_len}"
    hint = "raise cutoff_len, or set on_overlength: drop"
    if rules.on_overlength == "error":
        raise FatalRowError("too long", origin, f"too long: {size}", hint)
    if rules.on_overlength == "drop":
        raise RowError("too long", origin, size, "raise cutoff_len")
    if shortened is None:
        last = sum(m.role == "user" for m in conversation.messages) - 1
        _, shortened = _longest_fitting(tokenizer, conversation, rules, 1, last)
    if shortened is None:
        raise RowError("too long", origin, f"even its last question and answer: {size}", hint)
    log.add("too long", origin, "oldest turns dropped")
    return shortened


def _longest_fitting(
    tokenizer: Any, conversation: Conversation, rules: EncodeConfig, first: int, near: int
) -> tuple[int, Example | None]:
    """Find the smallest number of oldest exchanges to drop, from `first` on, and the example.

    Args:
        near: the number to try first. From there the steps double, and are halved at the end: the
            work grows with the turns that fit, not with all of them.

    Returns:
        The number, and None if not even the last exchange fits.
    """
    messages = conversation.messages
    head = messages[:1] if messages[0].role == "system" else ()
    questions = [i for i, m in enumerate(messages) if m.role == "user"]
    low, high, best, dropped = first, max(len(questions) - 1, first), None, len(questions)
    middle, step, forward = min(near, high), 1, None
    while low <= high and (first == 0 or len(questions) > 1):
        rest = conversation
        if middle:
            rest = replace(conversation, messages=head + messages[questions[middle] :])
        try:
            drafted = find_spans(tokenizer, rest, rules.train_on, rules.train_on_thoughts)
            candidate = _examples(tokenizer, drafted, rules.train_on, {})[-1][1]
        except RowError:  # the remaining turns have no trained answer
            candidate = None
        long = candidate is not None and len(candidate.input_ids) > rules.cutoff_len
        if long:
            low = middle + 1
        else:
            best, dropped, high = candidate or best, middle, middle - 1
        step = 2 * step if forward in (None, long) else 0
        forward = long
        middle += step // 2 if long else -(step // 2)
        middle = min(max(middle, low), high) if step else (low + high) // 2
    return dropped, best
