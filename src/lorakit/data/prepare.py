"""A recipe and a tokenizer enter; examples to train on, held-out ones and a report leave."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.check import (
    FaultLog,
    RowFault,
    SpoilsRun,
    check_turns,
    fingerprint,
    refuse_if_empty,
    report_duplicates,
    report_overlap,
)
from lorakit.data.formats import GUESS_ROWS, FormatGuess, guess_format, to_conversation
from lorakit.data.read import read_rows
from lorakit.data.split import split
from lorakit.data.template import Rules, encode_many, resolve_template
from lorakit.errors import DataError
from lorakit.recipe import Recipe
from lorakit.records import Conversation, DataReport, Document, Example, Message, Origin, Row
from lorakit.run_dir import write_text

Item = Conversation | Document


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run trains on and is scored on: examples, and the items they were made from."""

    train: Sequence[Example]
    val: Sequence[Example]
    train_conversations: Sequence[Item]
    val_conversations: Sequence[Item]
    report: DataReport


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One usable row with its content hash and the examples it became."""

    item: Item
    mark: str
    examples: list[Example]


def _marks(encoded: Sequence[_Encoded]) -> Iterator[tuple[str, Origin]]:
    return ((e.mark, e.item.origin) for e in encoded)


def prepare(
    recipe: Recipe, tokenizer: Any, folders: Sequence[Path] = (), inspecting: bool = False
) -> Prepared:
    """Run the stages from source strings to examples; sets the chat template on `tokenizer`.

    Args:
        folders: where relative paths are tried after the current directory.
        inspecting: rows that would spoil the training are counted, not stopped at.

    Raises:
        DataError: a source is missing or damaged, nothing usable is left, or a row would spoil
            the training; every message names the file and the row.
        ModelError: the tokenizer has no workable chat template.
    """
    log = FaultLog()
    items, sources = _load(recipe.sources, recipe, folders, log)
    if recipe.val_data:
        held_items, held_sources = _load([recipe.val_data], recipe, folders, log)
    else:
        held_sources = []
        items, held_items = _cut_lone_document(items, recipe.held_out, log)
    thinking = any("</think>" in text for item in items for text in _answers(item))
    info = resolve_template(tokenizer, recipe.model, thinking)
    encoded = _encode_all(items, recipe, tokenizer, log, inspecting)
    report_duplicates(_marks(encoded), log)
    if held_items:
        train, held = encoded, _encode_all(held_items, recipe, tokenizer, log, inspecting)
        report_overlap(_marks(train), _marks(held), log)
    else:
        train, held = split(encoded, recipe.held_out, recipe.seed, lambda e: e.mark)
    examples, val = [[x for e in part for x in e.examples] for part in (train, held)]
    report = DataReport(
        sources=tuple(sources + held_sources),
        rows_read=sum(s["rows"] for s in sources + held_sources),
        examples_train=len(examples),
        examples_val=len(val),
        tokens_train=sum(len(x.input_ids) for x in examples),
        trained_tokens_train=sum(x.trained_tokens for x in examples),
        tokens_val=sum(len(x.input_ids) for x in val),
        trained_tokens_val=sum(x.trained_tokens for x in val),
        longest_example=max(len(x.input_ids) for x in itertools.chain(examples, val)),
        cutoff_len=recipe.cutoff_len,
        template=info.source,
        faults=log.faults(),
    )
    return Prepared(examples, val, [e.item for e in train], [e.item for e in held], report)


def write_validation(path: Path, items: Sequence[Item]) -> None:
    """Keep held-out rows as JSON lines: {"messages": [...]} (OpenAI's form) or {"text": ...}."""
    lines = []
    for item in items:
        if isinstance(item, Document):
            row: dict[str, Any] = {"text": item.text}
        else:
            row = {"messages": [_turn(message) for message in item.messages]}
            row |= {"tools": list(item.tools)} if item.tools else {}
        lines.append(json.dumps({**row, "from": str(item.origin)}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_validation(path: Path) -> list[Item]:
    """The held-out rows that `write_validation` kept; none where nothing was held out.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    found: list[Item] = []
    for row in read_rows(str(path)):
        try:
            origin = Origin(*_split_origin(row))
            if "text" in row.values:
                found.append(Document(row.values["text"], origin))
            else:
                turns = tuple(_message(turn) for turn in row.values["messages"])
                found.append(Conversation(turns, origin, tuple(row.values.get("tools", ()))))
        except (KeyError, TypeError) as error:
            raise DataError(f"{row.origin}: not a held-out row as lorakit writes it") from error
    return found


def _turn(message: Message) -> dict[str, Any]:
    return message.as_dict() if message.train else {**message.as_dict(), "train": False}


def _message(turn: dict[str, Any]) -> Message:
    extra = {k: v for k, v in turn.items() if k not in ("role", "content", "train")}
    return Message(turn["role"], turn["content"], extra, turn.get("train", True))


def _split_origin(row: Row) -> tuple[str, int]:
    source, _, number = str(row.values.get("from", row.origin)).rpartition(":")
    return source, int(number) if number.isdigit() else row.origin.row


# -- reading --------------------------------------------------------------------------------------


def _load(
    names: Sequence[str], recipe: Recipe, folders: Sequence[Path], log: FaultLog
) -> tuple[list[Item], list[dict[str, Any]]]:
    """Usable conversations and documents of all sources, and one line of the report for each."""
    items: list[Item] = []
    lines = []
    for name in names:
        own = FaultLog()
        found: list[Item] = []
        read = 0
        formats: dict[str, str] = {}
        rows = read_rows(name, folders, offline=recipe.offline)
        # A folder may mix formats: each file is looked at by itself.
        for _, group in itertools.groupby(rows, key=lambda row: row.origin.source):
            first = list(itertools.islice(group, GUESS_ROWS))
            guess = guess_format(first, recipe.columns)
            formats.setdefault(guess.name, guess.reason)
            for row in itertools.chain(first, group):
                read += 1
                found += _convert(row, guess, recipe, own)
        shown = Path(name).name if Path(name).is_absolute() else name
        refuse_if_empty(len(found), read, shown, own)
        log.absorb(own)
        items += found
        lines.append(
            {
                "source": shown,
                "format": ", ".join(formats),
                "reason": next(iter(formats.values())),
                "rows": read,
                "left_out": own.rows_left_out,
            }
        )
    return items, lines


def _convert(row: Row, guess: FormatGuess, recipe: Recipe, log: FaultLog) -> Iterator[Item]:
    try:
        item = to_conversation(row, guess, recipe.system)
        yield check_turns(item, log) if isinstance(item, Conversation) else item
    except RowFault as fault:
        log.leave_out(fault)


def _answers(item: Item) -> Iterator[str]:
    if isinstance(item, Conversation):
        told = (m for m in item.messages if m.role == "assistant")
        yield from ("</think>" if m.extra.get("reasoning_content") else m.content for m in told)


# -- encoding and holding out ---------------------------------------------------------------------


def _encode_all(
    items: Sequence[Item], recipe: Recipe, tokenizer: Any, log: FaultLog, inspecting: bool
) -> list[_Encoded]:
    own = FaultLog()
    found = []
    rules = Rules(recipe.train_on, recipe.cutoff_len, recipe.too_long)
    for item, made in encode_many(tokenizer, items, rules, own):
        if isinstance(made, SpoilsRun) and not inspecting:
            raise made
        if isinstance(made, RowFault):
            own.leave_out(made)
        else:
            found.append(_Encoded(item, fingerprint(item), made))
    refuse_if_empty(len(found), len(items), "data", own)
    log.absorb(own)
    return found


def _cut_lone_document(
    items: list[Item], held_out: float | int, log: FaultLog
) -> tuple[list[Item], list[Item]]:
    """A single document in two, at the paragraph border nearest to the held-out share of its end.

    Several items, or a text without borders, come back whole: they are split later, or cannot be.
    """
    if not held_out or len(items) != 1 or not isinstance(items[0], Document):
        return items, []
    document = items[0]
    text = document.text
    wanted = (1 - (held_out if held_out < 1 else 0.05)) * len(text)
    borders = [found.end() for found in re.finditer(r"\n\s*\n", text.strip("\n"))]
    borders = [at for at in borders if 0 < at < len(text.rstrip())]
    if not borders:
        return items, []
    at = min(borders, key=lambda border: abs(border - wanted))
    log.add("a single document", document.origin, "its end is held out")
    return [Document(text[:at], document.origin)], [Document(text[at:], document.origin)]
