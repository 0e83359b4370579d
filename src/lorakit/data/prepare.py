"""A recipe and a tokenizer enter; training and held-out examples and the data report leave."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.check import FaultLog, content_key
from lorakit.data.chunk import encode_document
from lorakit.data.formats import UnusableRow, guess_format, to_record
from lorakit.data.read import read_rows
from lorakit.data.split import split
from lorakit.data.template import encode, resolve_template
from lorakit.errors import DataError
from lorakit.recipe import Recipe
from lorakit.records import Conversation, DataReport, Document, Example, Message, Origin
from lorakit.run_dir import write_text

# Rows looked at to find a source's format.
GUESS_ROWS = 20

Record = Conversation | Document


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training and evaluation need of the data."""

    train: Sequence[Example]
    val: Sequence[Example]
    train_records: Sequence[Record]
    val_records: Sequence[Record]
    report: DataReport


def prepare(recipe: Recipe, tokenizer: Any, folders: Sequence[Path] = (Path(),)) -> Prepared:
    """Read, normalize, check, split and tokenize all sources of a recipe.

    Raises:
        DataError: a source cannot be read or recognized, or nothing is left to train on.
    """
    log = FaultLog()
    template = resolve_template(tokenizer, recipe.model)
    summaries: list[dict[str, Any]] = []
    records: list[Record] = []
    for source in recipe.sources:
        records += _read_source(source, recipe, folders, log, summaries)
    _note_duplicates(records, log)
    if recipe.val_data is not None:
        train_records = records
        val_records = _read_source(recipe.val_data, recipe, folders, log, summaries)
        _note_overlap(train_records, val_records, log)
    else:
        train_records, val_records = split(records, recipe.held_out, recipe.seed)
    rows_read = sum(s["rows"] for s in summaries)
    train_records, train = _encode_all(train_records, recipe, tokenizer, log)
    val_records, val = _encode_all(val_records, recipe, tokenizer, log)
    if not train:
        raise _nothing_left(recipe, log, rows_read)
    report = DataReport(
        sources=tuple(summaries),
        rows_read=rows_read,
        examples_train=len(train),
        examples_val=len(val),
        tokens_train=sum(len(e.input_ids) for e in train),
        trained_tokens_train=sum(e.trained_tokens for e in train),
        tokens_val=sum(len(e.input_ids) for e in val),
        trained_tokens_val=sum(e.trained_tokens for e in val),
        longest_example=max(len(e.input_ids) for e in itertools.chain(train, val)),
        cutoff_len=recipe.cutoff_len,
        template=template,
        faults=log.faults(),
    )
    return Prepared(train, val, train_records, val_records, report)


def write_validation(path: Path, records: Sequence[Record]) -> None:
    """Held-out rows as JSONL: `messages` for conversations, `text` for documents."""
    lines = []
    for record in records:
        if isinstance(record, Document):
            row: dict[str, Any] = {"text": record.text}
        else:
            row = {"messages": [m.as_dict() for m in record.messages]}
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(path, "".join(line + "\n" for line in lines))


def read_validation(path: Path) -> list[Record]:
    """The held-out rows a run kept; an empty list when it kept none."""
    if not path.exists():
        return []
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        row, origin = json.loads(line), Origin(path.name, number)
        if "text" in row:
            records.append(Document(row["text"], origin))
        else:
            turns = tuple(Message(m["role"], m["content"]) for m in row["messages"])
            records.append(Conversation(turns, origin))
    return records


def encode_record(
    tokenizer: Any, record: Record, recipe: Recipe, log: FaultLog | None = None
) -> list[Example]:
    """One record as examples, by the recipe's rules.

    Raises:
        UnusableRow: it cannot be trained.
    """
    if isinstance(record, Document):
        return encode_document(tokenizer, record, recipe.cutoff_len)
    examples = encode(
        tokenizer, record, recipe.train_on, recipe.cutoff_len, recipe.too_long, log
    )
    if any(e.trained_tokens == 0 for e in examples):
        raise UnusableRow("no trained token")
    return examples


def _read_source(
    source: str,
    recipe: Recipe,
    folders: Sequence[Path],
    log: FaultLog,
    summaries: list[dict[str, Any]],
) -> list[Record]:
    rows = read_rows(source, folders, offline=recipe.offline)
    first = list(itertools.islice(rows, GUESS_ROWS))
    if not first:
        raise DataError(f"data: {source}: holds no rows")
    guess = guess_format(first, recipe.columns)
    records: list[Record] = []
    count = 0
    for row in itertools.chain(first, rows):
        count += 1
        try:
            records.append(to_record(row, guess, recipe.system))
        except UnusableRow as fault:
            log.add(fault.kind, row.origin)
    name = Path(source).name if Path(source).is_absolute() else source
    summaries.append(
        {"source": name, "format": guess.format.name, "by": guess.reason, "rows": count}
    )
    return records


def _encode_all(
    records: Sequence[Record], recipe: Recipe, tokenizer: Any, log: FaultLog
) -> tuple[list[Record], list[Example]]:
    kept: list[Record] = []
    examples: list[Example] = []
    for record in records:
        try:
            examples += encode_record(tokenizer, record, recipe, log)
            kept.append(record)
        except UnusableRow as fault:
            log.add(fault.kind, record.origin)
    return kept, examples


def _note_duplicates(records: Sequence[Record], log: FaultLog) -> None:
    seen: set[int] = set()
    for record in records:
        key = content_key(record)
        if key in seen:
            log.add("exact copy of an earlier row", record.origin, "kept")
        seen.add(key)


def _note_overlap(train: Sequence[Record], val: Sequence[Record], log: FaultLog) -> None:
    keys = {content_key(record) for record in train}
    for record in val:
        if content_key(record) in keys:
            log.add("held-out row that is also trained", record.origin, "kept")


def _nothing_left(recipe: Recipe, log: FaultLog, rows: int) -> DataError:
    lines = [
        f"  {f.count} x {f.kind} ({', '.join(f.first_rows)})" for f in log.faults()
    ]
    return DataError(
        f"data: none of {rows} rows can be trained:\n" + "\n".join(lines),
        hint="see what is wrong with the first of them"
        if lines
        else "lower val_size or give more rows",
    )
