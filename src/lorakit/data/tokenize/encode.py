"""Conversations and documents enter; token ids and the training mask leave: made here alone.

The tokenizer's chat template is the only truth, and `data/tokenize/spans.py` finds the answers in
what it writes.
The ids before an answer, which chat and evaluation feed the model, must be a prefix of the training
ids: where the template or the tokenizer breaks that, an answer becomes an example of its own, and
the border between question and answer a border between tokens.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from lorakit.data.tokenize.batch_tokenizer import borders_of, tokenize_in_background
from lorakit.data.tokenize.documents import as_instructions, encode_document
from lorakit.data.tokenize.example_checks import verify_example
from lorakit.data.tokenize.spans import Draft, Span, find_spans
from lorakit.data.tokenize.truncate import split_conversation
from lorakit.recipe.schema import Recipe
from lorakit.types import IGNORE, Conversation, Document, Example, Message

BLOCK, BLOCK_CHARS = 2048, 2**22


@dataclass(frozen=True, slots=True)
class EncodeConfig:
    """What a recipe says about masks and lengths, in its own words."""

    train_on: str
    cutoff_len: int
    on_overlength: str
    documents: str = "completion"
    overlap: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> EncodeConfig:
        """The rules of a recipe."""
        texts = recipe.documents, recipe.document_overlap
        return cls(recipe.train_on, recipe.cutoff_len, recipe.on_overlength, *texts)

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
    """Examples of one conversation: one, or one per answer where a template rewrites old turns.

    Args:
        train_on: "responses" (every answer), "last" (the last one), "all" (every token).
        on_overlength: over `cutoff_len` tokens: "drop_oldest_turns", "split", "drop" or "error". An
            answer is never cut.
        log: where turns that were dropped are counted.

    Raises:
        RowFault: the row is too long, or the template refuses it: it can be left out.
        SpoilsRun: training on it would go wrong (no trained token, no end of turn, double BOS), or
            it is too long and `on_overlength` is "error". The row is named.
    """
    rules = EncodeConfig(train_on, cutoff_len, on_overlength)
    ((_, made),) = encode_many(tokenizer, [item], rules, log or IssueLog())
    if isinstance(made, RowError):
        raise made
    return made


def encode_many(
    tokenizer: Any, items: Iterable[Conversation | Document], rules: EncodeConfig, log: IssueLog
) -> Iterator[tuple[Conversation | Document, list[Example] | RowError]]:
    """Each item with its examples, or with the fault for which it cannot be used.

    Texts are tokenized in blocks, over all cores, while the next block is rendered.
    """
    blocks = (
        [(item, _try_draft(tokenizer, item, rules.train_on)) for item in block]
        for block in _blocks(items)
    )
    tail = borders_of(tokenizer).tail

    def texts(block: list[tuple[Conversation | Document, Draft | RowError | None]]) -> list[str]:
        # Texts with special tokens in them are tokenized piece by piece.
        drafts = [d for _, d in block if isinstance(d, Draft) and not d.guard.active]
        return [text for d in drafts for text in d.texts(tail)]

    for block, known in tokenize_in_background(tokenizer, blocks, texts):
        for item, drafted in block:
            try:
                yield item, _encode_one(tokenizer, item, drafted, rules, known, log)
            except RowError as fault:
                yield item, fault


# -- one conversation -> ids and mask -------------------------------------------------------------


def _try_draft(
    tokenizer: Any, item: Conversation | Document, train_on: str
) -> Draft | RowError | None:
    if isinstance(item, Document):
        return None
    try:
        return find_spans(tokenizer, item, train_on)
    except RowError as fault:
        return fault


def _encode_one(
    tokenizer: Any,
    item: Conversation | Document,
    drafted: Draft | RowError | None,
    rules: EncodeConfig,
    known: Mapping[str, list[int]],
    log: IssueLog,
) -> list[Example]:
    if isinstance(item, Document):
        return _encode_document(tokenizer, item, rules, log)
    if not isinstance(drafted, Draft):
        raise drafted or RowError("no answer", item.origin, "nothing to train")
    if drafted.guard.active:
        log.add("special token written in a turn", item.origin, "kept as plain text")
    for kind, action in dict.fromkeys(drafted.notes):
        log.add(kind, item.origin, action)
    made = _examples(tokenizer, drafted, rules.train_on, known)
    long = any(len(example.input_ids) > rules.cutoff_len for _, example in made)
    # Where only the last answer is trained, there is one example to be made, whatever its length.
    if long and rules.on_overlength == "split" and rules.train_on != "last":
        return _encode_pieces(tokenizer, item, rules, log)
    fitting: list[Example] = []
    faults: list[RowError] = []
    for turn, example in made:
        try:
            if len(example.input_ids) > rules.cutoff_len:
                part = replace(item, messages=item.messages[: turn + 1])
                example = _shorten(tokenizer, part, rules, example, log)
            fitting.append(example)
        except FatalRowError:
            raise
        except RowError as fault:
            faults.append(fault)
    if not fitting:
        raise faults[0]
    for _ in faults:
        log.add("too long", item.origin, "that answer left out, the others kept")
    for example in fitting:
        verify_example(tokenizer, example, rules.train_on)
    return fitting


def _encode_pieces(
    tokenizer: Any, conversation: Conversation, rules: EncodeConfig, log: IssueLog
) -> list[Example]:
    """Examples of as many pieces as it takes; each answer is trained in one of them."""
    single = replace(rules, on_overlength="drop")

    def tried(piece: Conversation) -> tuple[list[Example], RowError | None]:
        try:
            own, drafted = IssueLog(), find_spans(tokenizer, piece, rules.train_on)
            made = _encode_one(tokenizer, piece, drafted, single, {}, own)
            lost = any(fault.kind == "too long" for fault in own.faults())
            return made, RowError("too long", piece.origin, "an answer would go") if lost else None
        except FatalRowError:
            raise
        except RowError as fault:
            return [], fault

    def fits(piece: Conversation) -> bool:
        fault = tried(piece)[1]
        # Answers marked train: false may stand alone in a piece; with others they are context.
        return fault is None or fault.kind == "no trained answer"

    found: list[Example] = []
    faults: list[RowError] = []
    for piece in split_conversation(conversation, fits):
        made, fault = tried(piece)
        found += made
        if fault is not None and fault.kind != "no trained answer":
            faults.append(fault)
    if not found:
        raise faults[0]
    log.add("too long", conversation.origin, "split into several examples")
    for _ in faults:
        log.add("too long", conversation.origin, "that answer left out, the others kept")
    return found


def _encode_document(
    tokenizer: Any, document: Document, rules: EncodeConfig, log: IssueLog
) -> list[Example]:
    """A text as it is, or as requests and answers, in pieces that fit."""
    overlap = min(rules.overlap, rules.cutoff_len // 4)
    if rules.documents == "completion":
        return encode_document(tokenizer, document, rules.cutoff_len, overlap, log)
    single, room = replace(rules, on_overlength="drop"), rules.cutoff_len - overlap
    fault = RowError("too long", document.origin, f"no text fits cutoff_len {rules.cutoff_len}")
    while room > 1 and fault.kind == "too long":
        # What request and template take is known when they are written: then less is left.
        room = room * 3 // 4
        chats, own = as_instructions(tokenizer, document, room, overlap), IssueLog()
        found: list[Example] = []
        for _, made in encode_many(tokenizer, chats, single, own):
            if isinstance(made, RowError):
                fault = made
                break
            found += made
        else:
            log.merge(own)
            return found
    raise fault


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
        short = borders.tail(prompt)
        tail = known.get(short) or to_ids(tokenizer, short, None, inside=True)
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
    stops = template_capabilities(tokenizer).stops

    def end(start: int) -> int:
        ends = [ids.index(stop, start) + 1 for stop in stops if stop in ids[start:]]
        found = min(ends, default=0)
        if not found:
            raise FatalRowError(
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
    tokenizer: Any, conversation: Conversation, rules: EncodeConfig, example: Example, log: IssueLog
) -> Example:
    """The example without its oldest exchanges, as few as it takes; the system turn stays."""
    origin = conversation.origin
    what = f"{len(example.input_ids)} tokens, over cutoff_len {rules.cutoff_len}"
    hint = "raise cutoff_len, or set on_overlength: drop"
    if rules.on_overlength == "error":
        raise FatalRowError("too long", origin, f"too long: {what}", hint)
    if rules.on_overlength == "drop":
        raise RowError("too long", origin, what, "raise cutoff_len")
    messages = conversation.messages
    head = 1 if messages[0].role == "system" else 0
    asked = [i for i, m in enumerate(messages) if m.role == "user"]
    low, high = 1, len(asked) - 1
    best: Example | None = None
    while low <= high:
        middle = (low + high) // 2
        rest = replace(conversation, messages=messages[:head] + messages[asked[middle] :])
        try:
            drafted = find_spans(tokenizer, rest, rules.train_on)
        except RowError:  # nothing is trained in so little of it
            high = middle - 1
            continue
        candidate = _examples(tokenizer, drafted, rules.train_on, {})[-1][1]
        if len(candidate.input_ids) <= rules.cutoff_len:
            best, high = candidate, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise RowError("too long", origin, f"even its last question and answer: {what}", hint)
    log.add("too long", origin, "oldest turns dropped")
    return best
