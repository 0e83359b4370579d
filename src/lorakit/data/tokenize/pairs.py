"""Encode preference data: both conversations of a pair to one example, labels to examples.

Each conversation is encoded as in supervised training, so its loss mask and its checks are the
same. If a pair is over `cutoff_len`, the oldest turns of its prompt are dropped from both.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from lorakit.data.issues import IssueLog, RowError
from lorakit.types import IGNORE, Conversation, Document, Example

Item = Conversation | Document
Result = list[Example] | RowError
# (items without pairs, on_overlength, log) -> each item with its examples or its error.
EncodeSides = Callable[[Iterable[Item], str, IssueLog], Iterator[tuple[Item, Result]]]


def encode_pairs(
    items: Iterable[Item],
    encode_sides: EncodeSides,
    on_overlength: str,
    train_on_thoughts: bool,
    log: IssueLog,
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its examples, or with the error for which it cannot be used.

    The items are all pairs, or none is.
    """
    stream = iter(items)
    first = next(stream, None)
    if first is None:
        return
    stream = itertools.chain([first], stream)
    if not _is_pair(first):
        for item, result in encode_sides(stream, on_overlength, log):
            yield item, _labeled(item, result)
        return
    waiting: deque[Conversation] = deque()

    def sides() -> Iterator[Item]:
        for item in stream:
            if isinstance(item, Conversation):
                waiting.append(item)
                yield from _sides(item)

    single = "error" if on_overlength == "error" else "drop"
    results = encode_sides(sides(), single, log)
    for (_, chosen), (_, rejected) in zip(results, results, strict=True):
        pair = waiting.popleft()
        joined = _join(pair, chosen, rejected, train_on_thoughts)
        if _too_long(joined) and on_overlength == "drop_oldest_turns":
            joined = _shortened(pair, encode_sides, joined, train_on_thoughts, log)
        yield pair, joined


def _is_pair(item: Item) -> bool:
    return isinstance(item, Conversation) and bool(item.rejected)


def _labeled(item: Item, result: Result) -> Result:
    """Give the label of KTO to the examples of an answer."""
    if isinstance(result, RowError) or isinstance(item, Document) or item.good is None:
        return result
    return [replace(example, good=item.good) for example in result]


def _sides(pair: Conversation) -> tuple[Conversation, Conversation]:
    chosen = replace(pair, rejected=())
    return chosen, replace(chosen, messages=pair.rejected)


def _too_long(result: Result) -> bool:
    return isinstance(result, RowError) and result.kind == "too long"


def _join(pair: Conversation, chosen: Result, rejected: Result, exact: bool) -> Result:
    """Join the examples of both conversations.

    Args:
        exact: every token of an answer is trained, so those before it are the prompt.
    """
    for result in (chosen, rejected):
        if isinstance(result, RowError):
            return result
    if isinstance(chosen, RowError) or isinstance(rejected, RowError):
        raise AssertionError("unreachable: errors are returned above")
    if len(chosen) != 1 or len(rejected) != 1:
        return RowError(
            "pair in several examples",
            pair.origin,
            "the template rewrites earlier turns, so each answer of this pair is an example",
            "set train_on: last",
        )
    a, b = chosen[0], rejected[0]
    if a.input_ids == b.input_ids:
        return RowError("identical answers", pair.origin, "both answers have the same tokens")
    starts = [_prompt_length(example) for example in (a, b)]
    if exact and a.input_ids[: starts[0]] != b.input_ids[: starts[1]]:
        return RowError(
            "prompts differ",
            pair.origin,
            f"the tokens before the answers differ ({starts[0]} and {starts[1]} tokens)",
            "the chat template writes the prompt of each answer differently",
        )
    ids, labels = a.input_ids + b.input_ids, a.labels + b.labels
    return [Example(ids, labels, pair.origin, second=len(a.input_ids))]


def _prompt_length(example: Example) -> int:
    return next((i for i, label in enumerate(example.labels) if label != IGNORE), 0)


def _shortened(
    pair: Conversation, encode_sides: EncodeSides, fault: Result, exact: bool, log: IssueLog
) -> Result:
    """Drop as few of the oldest turns of the prompt as needed; the system turn is kept."""
    messages, rejected = pair.messages, pair.rejected
    equal = enumerate(zip(messages, rejected, strict=False))
    start = next((i for i, (a, b) in equal if a != b), len(messages))
    head = messages[:1] if messages[0].role == "system" else ()
    questions = [i for i, m in enumerate(messages[:start]) if m.role == "user"]
    for begin in questions[1:]:
        shorter = replace(pair, messages=head + messages[begin:], rejected=head + rejected[begin:])
        (_, chosen), (_, other) = encode_sides(_sides(shorter), "drop", IssueLog())
        result = _join(pair, chosen, other, exact)
        if not _too_long(result):
            log.add("too long", pair.origin, "oldest turns dropped")
            return result
    return fault
