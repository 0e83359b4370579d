"""Conversations and documents enter; token ids and the training mask leave: made here alone.

The tokenizer's chat template is the only truth, and `spans.py` finds the answers in what it writes.
The ids before an answer, which chat and evaluation feed the model, must be a prefix of the training
ids: where the template or the tokenizer breaks that, an answer becomes an example of its own, and
the border between question and answer a border between tokens.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from lorakit.data.check import FaultLog, RowFault, SpoilsRun
from lorakit.data.chunk import windows
from lorakit.data.ids import borders_of, tokenize_ahead
from lorakit.data.render import Guard, habits_of, render, to_ids
from lorakit.data.render import stop_token_ids as stop_token_ids
from lorakit.data.resolve import TemplateInfo as TemplateInfo
from lorakit.data.resolve import resolve_template as resolve_template
from lorakit.data.spans import Draft, Span, draft
from lorakit.recipe import Recipe
from lorakit.records import IGNORE, Conversation, Document, Example, Message

BLOCK, BLOCK_CHARS = 2048, 2**22


@dataclass(frozen=True, slots=True)
class Rules:
    """What a recipe says about masks and lengths: its `train_on`, `cutoff_len` and `too_long`."""

    train_on: str
    cutoff_len: int
    too_long: str

    @classmethod
    def of(cls, recipe: Recipe) -> Rules:
        """The rules of a recipe."""
        return cls(recipe.train_on, recipe.cutoff_len, recipe.too_long)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def _blocks(items: Iterable[Conversation | Document]) -> Iterator[list[Conversation | Document]]:
    """Items in blocks, large enough to tokenize at once and small enough to hold in memory."""
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
    """Ids [T] of a conversation that waits for an answer: what chat and evaluation feed the model.

    Raises:
        DataError: the template refuses these turns.
    """
    guard = Guard(habits_of(tokenizer), messages, tools)
    text = render(tokenizer, guard.messages(messages), prompt=True, tools=guard.tools)
    return to_ids(tokenizer, text, guard)


def encode(
    tokenizer: Any,
    item: Conversation | Document,
    train_on: str = "responses",
    cutoff_len: int = 2048,
    too_long: str = "drop_oldest_turns",
    log: FaultLog | None = None,
) -> list[Example]:
    """Examples of one conversation: one, or one per answer where a template rewrites old turns.

    Args:
        train_on: "responses" (every answer), "last" (the last one), "all" (every token).
        too_long: over `cutoff_len` tokens: "drop_oldest_turns", "drop" or "error". An answer is
            never cut.
        log: where turns that were dropped are counted.

    Raises:
        RowFault: the row is too long, or the template refuses it: it can be left out.
        SpoilsRun: training on it would go wrong (no trained token, no end of turn, double BOS), or
            it is too long and `too_long` is "error". The row is named.
    """
    rules = Rules(train_on, cutoff_len, too_long)
    ((_, made),) = encode_many(tokenizer, [item], rules, log or FaultLog())
    if isinstance(made, RowFault):
        raise made
    return made


def encode_many(
    tokenizer: Any, items: Iterable[Conversation | Document], rules: Rules, log: FaultLog
) -> Iterator[tuple[Conversation | Document, list[Example] | RowFault]]:
    """Each item with its examples, or with the fault for which it cannot be used.

    Texts are tokenized in blocks, over all cores, while the next block is rendered.
    """
    blocks = (
        [(item, _try_draft(tokenizer, item, rules.train_on)) for item in block]
        for block in _blocks(items)
    )
    tail = borders_of(tokenizer).tail

    def texts(block: list[tuple[Conversation | Document, Draft | RowFault | None]]) -> list[str]:
        # Texts with special tokens in them are tokenized piece by piece.
        drafts = [d for _, d in block if isinstance(d, Draft) and not d.guard.active]
        return [text for d in drafts for text in d.texts(tail)]

    for block, known in tokenize_ahead(tokenizer, blocks, texts):
        for item, drafted in block:
            try:
                yield item, _encode_one(tokenizer, item, drafted, rules, known, log)
            except RowFault as fault:
                yield item, fault


def encode_document(
    tokenizer: Any, document: Document, cutoff_len: int = 2048, log: FaultLog | None = None
) -> list[Example]:
    """Windows of at most `cutoff_len` tokens over plain text, closed by eos; trained in full once.

    Where the tokenizer puts a BOS before a text, each window begins with it; otherwise a window
    begins with the last token of the one before, untrained, so that its first own token is
    predicted from something. Special tokens written in the text are read as such.

    Raises:
        RowFault: no token could be trained.
    """
    habits, eos = habits_of(tokenizer), tokenizer.eos_token_id
    if log and habits.specials is not None and habits.specials.search(document.text):
        log.add("special token written in a text", document.origin, "read as that token")
    encoding = tokenizer(
        document.text,
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = list(encoding["input_ids"])
    if habits.bos_id is not None and ids[:1] == [habits.bos_id]:
        ids, shift = ids[1:], 1
    else:
        shift = 0
    starts = [o[0] for o in encoding["offset_mapping"][shift:]] if tokenizer.is_fast else None
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
        if starts is not None:
            starts.append(len(document.text))
    found = []
    for begin, end in windows(document.text, starts, len(ids), cutoff_len - 1):
        before = [habits.bos_id] if habits.bos_id is not None else ids[max(0, begin - 1) : begin]
        own = ids[begin:end]
        labels = [IGNORE] * len(before) + own
        labels[0] = IGNORE
        found.append(Example([*before, *own], labels, document.origin))
    if not any(example.trained_tokens for example in found):
        raise RowFault("nothing to train", document.origin, "the text is a single token")
    return found


def verify_example(tokenizer: Any, example: Example, train_on: str = "responses") -> None:
    """Refuse an example of a conversation that would spoil the training.

    Raises:
        SpoilsRun: no trained token, two BOS in a row, or a trained answer whose end of turn is not
            trained.
    """
    origin, ids, labels = example.origin, example.input_ids, example.labels
    if not example.trained_tokens:
        raise SpoilsRun(
            "nothing trained", origin, "no token of this row would be trained: all are masked"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise SpoilsRun(
            "two BOS tokens",
            origin,
            f"it begins with two BOS tokens ({tokenizer.bos_token})",
            "the chat template and the tokenizer both add one: take it out of the template",
        )
    if train_on == "all":
        return
    # After each trained token, is the next end-of-turn token trained too?
    stops = habits_of(tokenizer).stops
    ends = sorted(i for stop in stops for i in _places(ids, stop))
    for begin, end in pairwise([-1, *ends, len(ids)]):
        part = labels[begin + 1 : end]
        closed = end < len(ids) and labels[end] != IGNORE
        if not closed and part.count(IGNORE) < len(part):
            last = next(label for label in reversed(part) if label != IGNORE)
            raise SpoilsRun(
                "answer without end of turn",
                origin,
                f"a trained part ends with {tokenizer.decode([last])!r}, not with an end-of-turn "
                "token: a model trained on it would not stop",
                "the chat template must close each answer with a special token",
            )


def _places(ids: list[int], token: int) -> list[int]:
    found = [-1]
    for _ in range(ids.count(token)):
        found.append(ids.index(token, found[-1] + 1))
    return found[1:]


# -- one conversation -> ids and mask -------------------------------------------------------------


def _try_draft(
    tokenizer: Any, item: Conversation | Document, train_on: str
) -> Draft | RowFault | None:
    if isinstance(item, Document):
        return None
    try:
        return draft(tokenizer, item, train_on)
    except RowFault as fault:
        return fault


def _encode_one(
    tokenizer: Any,
    item: Conversation | Document,
    drafted: Draft | RowFault | None,
    rules: Rules,
    known: Mapping[str, list[int]],
    log: FaultLog,
) -> list[Example]:
    if isinstance(item, Document):
        return encode_document(tokenizer, item, rules.cutoff_len, log)
    if not isinstance(drafted, Draft):
        raise drafted or RowFault("no answer", item.origin, "nothing to train")
    if drafted.guard.active:
        log.add("special token written in a turn", item.origin, "kept as plain text")
    for kind, action in dict.fromkeys(drafted.notes):
        log.add(kind, item.origin, action)
    fitting: list[Example] = []
    faults: list[RowFault] = []
    for turn, example in _examples(tokenizer, drafted, rules.train_on, known):
        try:
            if len(example.input_ids) > rules.cutoff_len:
                part = replace(item, messages=item.messages[: turn + 1])
                example = _shorten(tokenizer, part, rules, example, log)
            fitting.append(example)
        except SpoilsRun:
            raise
        except RowFault as fault:
            faults.append(fault)
    if not fitting:
        raise faults[0]
    for _ in faults:
        log.add("too long", item.origin, "that answer left out, the others kept")
    for example in fitting:
        verify_example(tokenizer, example, rules.train_on)
    return fitting


def _examples(
    tokenizer: Any, drafted: Draft, train_on: str, known: Mapping[str, list[int]]
) -> list[tuple[int, Example]]:
    """(turn of the last answer inside, example) pairs, of any length."""
    found = []
    guard, borders = drafted.guard, borders_of(tokenizer)

    def start(ids: list[int], text: str, prompt: str) -> int | None:
        if guard.active:
            own = to_ids(tokenizer, prompt, guard)
            return len(own) if ids[: len(own)] == own else None
        tail = known.get(borders.tail(prompt))
        if tail is None:
            tail = to_ids(tokenizer, borders.tail(prompt), None, inside=True)
        return borders.prompt_length(ids, text, prompt, tail)

    for group in drafted.groups:
        text = group[-1].text
        ids = to_ids(tokenizer, text, guard, known=known)
        starts = [start(ids, text, span.prompt) for span in group]
        whole = [at for at in starts if at is not None]
        if len(whole) == len(group):
            found.append(_masked(tokenizer, drafted, group, ids, whole, train_on, known))
            continue
        for span in group:
            ids = to_ids(tokenizer, span.text, guard, known=known)
            prompt = to_ids(tokenizer, span.prompt, guard, known=known)
            if ids[: len(prompt)] != prompt:
                # A merge over the border (": " + "Paris"): generation never sees it: no training.
                rest = span.text[len(span.prompt) :]
                ids = prompt + to_ids(tokenizer, rest, guard, inside=True)
            found.append(_masked(tokenizer, drafted, [span], ids, [len(prompt)], train_on, known))
    return found


def _masked(
    tokenizer: Any,
    drafted: Draft,
    spans: Sequence[Span],
    ids: list[int],
    starts: Sequence[int],
    train_on: str,
    known: Mapping[str, list[int]],
) -> tuple[int, Example]:
    """Each answer trained from its start to its first stop token; by position, never by id."""
    origin, guard = drafted.conversation.origin, drafted.guard
    stops = habits_of(tokenizer).stops

    def end(start: int) -> int:
        found = 0
        for stop in stops:
            with suppress(ValueError):
                found = ids.index(stop, start, found or len(ids)) + 1
        if not found:
            raise SpoilsRun(
                "no end of turn", origin, "an answer has no end-of-turn token among its tokens"
            )
        return found

    def tokens_before(text: str) -> int:
        """Tokens of `ids` before the end of `text`; one that reaches over it does not count."""
        other = to_ids(tokenizer, text, guard, known=known)
        pairs = enumerate(zip(ids, other, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(other)))

    labels = [IGNORE, *ids[1:]] if train_on == "all" else [IGNORE] * len(ids)
    if train_on != "all":
        for start in starts:
            labels[start : end(start)] = ids[start : end(start)]
        for text, gap in ((span.text, gap) for span in spans for gap in span.gaps):
            begin, until = (tokens_before(text[:at]) for at in gap)
            labels[begin:until] = [IGNORE] * (until - begin)
    for span in drafted.untrained:
        start = tokens_before(span.prompt)
        labels[start : end(start)] = [IGNORE] * (end(start) - start)
    return spans[-1].turn, Example(ids, labels, origin)


def _shorten(
    tokenizer: Any, conversation: Conversation, rules: Rules, example: Example, log: FaultLog
) -> Example:
    """The example without its oldest exchanges, as few as it takes; the system turn stays."""
    origin = conversation.origin
    what = f"{len(example.input_ids)} tokens, over cutoff_len {rules.cutoff_len}"
    hint = "raise cutoff_len, or set too_long: drop"
    if rules.too_long == "error":
        raise SpoilsRun("too long", origin, f"too long: {what}", hint)
    if rules.too_long == "drop":
        raise RowFault("too long", origin, what, "raise cutoff_len")
    messages = conversation.messages
    head = 1 if messages[0].role == "system" else 0
    asked = [i for i, m in enumerate(messages) if m.role == "user"]
    low, high = 1, len(asked) - 1
    best: Example | None = None
    while low <= high:
        middle = (low + high) // 2
        rest = replace(conversation, messages=messages[:head] + messages[asked[middle] :])
        try:
            drafted = draft(tokenizer, rest, rules.train_on)
        except RowFault:  # nothing is trained in so little of it
            high = middle - 1
            continue
        candidate = _examples(tokenizer, drafted, rules.train_on, {})[-1][1]
        if len(candidate.input_ids) <= rules.cutoff_len:
            best, high = candidate, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise RowFault("too long", origin, f"even its last question and answer: {what}", hint)
    log.add("too long", origin, "oldest turns dropped")
    return best
