"""Conversations, documents and tokenized examples in Arrow files, read by index.

A million short chats are 6 GB as Python objects. Here they are memory-mapped and read on access;
the trainer gets the `datasets.Dataset` of the examples.

Items are JSON lines: OpenAI's `{"messages": [...], "tools": [...]}` or `{"text": ...}`, with
`"from"` for the source row; preference data adds `"rejected"`, or `"label"`. The held-out rows of a
run have the same form.
"""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from lorakit.data.cache import CacheEntry
from lorakit.data.chat_template.thoughts import has_thoughts
from lorakit.data.dedup import BINS, sign
from lorakit.data.issues import IssueLog, content_hash
from lorakit.data.sources.readers import read_rows
from lorakit.errors import DataError
from lorakit.storage.run_dir import write_text
from lorakit.types import IGNORE, Conversation, Document, Example, Message, Origin, Row

Item = Conversation | Document


def to_line(item: Item) -> str:
    """Serialize an item as one JSON object, without a line end."""
    if isinstance(item, Document):
        row: dict[str, Any] = {"text": item.text}
    else:
        row = {"messages": [_turn(message) for message in item.messages]}
        if item.rejected:
            row["rejected"] = [_turn(message) for message in item.rejected]
        if item.good is not None:
            row["label"] = item.good
        if item.tools:
            row["tools"] = list(item.tools)
    row["from"] = str(item.origin)
    return json.dumps(row, ensure_ascii=False)


def from_values(values: dict[str, Any], origin: Origin) -> Item:
    """Build the item of one parsed line.

    Raises:
        KeyError, TypeError: `to_line` did not write this line.
    """
    if "text" in values:
        return Document(values["text"], origin)
    turns = tuple(_message(turn) for turn in values["messages"])
    rejected = tuple(_message(turn) for turn in values.get("rejected", ()))
    tools, good = tuple(values.get("tools", ())), values.get("label")
    return Conversation(turns, origin, tools, rejected, good)


def write_validation(path: Path, items: Sequence[Item]) -> None:
    """Write held-out rows as JSON lines."""
    write_text(path, "".join(to_line(item) + "\n" for item in items))


def read_validation(path: Path) -> list[Item]:
    """Read the held-out rows that `write_validation` wrote; an empty list without such a file.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    items: list[Item] = []
    for row in read_rows(str(path)):
        try:
            items.append(from_values(row.values, _origin(row)))
        except (KeyError, TypeError) as error:
            raise DataError(f"{row.origin}: not a held-out row as lorakit writes it") from error
    return items


def _turn(message: Message) -> dict[str, Any]:
    return message.as_dict() if message.train else {**message.as_dict(), "train": False}


def _message(turn: dict[str, Any]) -> Message:
    if len(turn) == 2:
        return Message(turn["role"], turn["content"])
    extra = {k: v for k, v in turn.items() if k not in ("role", "content", "train")}
    return Message(turn["role"], turn["content"], extra, turn.get("train", True))


def _origin(row: Row) -> Origin:
    source, _, row_number = str(row.values.get("from", row.origin)).rpartition(":")
    return (
        Origin(source, int(row_number)) if row_number.isdigit() else Origin(source, row.origin.row)
    )


PREFERENCE_COLUMNS = ["second", "good"]
# Value of `good` in examples that have none.
NO_LABEL = -1
# Characters or tokens of a record batch; as Python objects these take 10 MB.
BATCH_SIZE = 2**18
_TOKENS = pa.list_(pa.int32())
_ORIGIN = [("source", pa.string()), ("row", pa.int64())]
_ITEMS = pa.schema(
    [
        ("item", pa.large_string()),
        *_ORIGIN,
        ("content_hash", pa.uint64()),
        ("prompt_hash", pa.uint64()),
        ("source_index", pa.int32()),
        ("signature", pa.list_(pa.uint8(), BINS)),
    ]
)
_EXAMPLES = pa.schema(
    [
        ("input_ids", _TOKENS),
        ("labels", _TOKENS),
        *_ORIGIN,
        ("second", pa.int32()),
        ("good", pa.int8()),
        ("content_hash", pa.uint64()),
        ("item_index", pa.int64()),
        ("trained_tokens", pa.int64()),
    ]
)
RowT = TypeVar("RowT")


class ArrowRows(Sequence[RowT]):
    """Rows of an Arrow table, chosen by index in any order and read from disk on access.

    Attributes:
        table: all rows.
        meta: values that were known after the last row was written.
        key: cache key of the table.
        chosen: indices of the chosen rows, int64 [N]; a row may occur more than once.
    """

    columns: ClassVar[list[str]]

    def __init__(self, entry: CacheEntry, chosen: NDArray[np.int64] | None = None) -> None:
        self._entry = entry
        self.table, self.meta, self.key = entry.table, entry.meta, entry.key
        self.chosen = np.arange(len(self.table)) if chosen is None else chosen

    def select(self, chosen: NDArray[np.int64]) -> Self:
        """Choose rows by their indices in the table."""
        return type(self)(self._entry, chosen)

    def remapped(self) -> Self:
        """The same rows with a memory map of their own, whose pages are freed with it."""
        table = Dataset.from_file(self.table.cache_files[0]["filename"])
        return type(self)(replace(self._entry, table=table), self.chosen)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The chosen rows with the columns that a trainer or a user needs."""
        return self.table.select_columns(self.columns).select(self.chosen)

    def column(self, name: str) -> NDArray[Any]:
        """Values of a column of numbers, one for each chosen row, without reading the others."""
        return self.table.data.column(name).to_numpy()[self.chosen]

    @property
    def content_hashes(self) -> NDArray[np.uint64]:
        """Content hash of each item, or of the item of each example, uint64 [N]."""
        return self.column("content_hash")

    def origin(self, number: int) -> Origin:
        """File and row of row `number`, without reading it."""
        source, row = (self.table.data.column(name) for name in ("source", "row"))
        index = int(self.chosen[number])
        return Origin(source[index].as_py(), row[index].as_py())

    def _read(self, row: Mapping[str, Any]) -> RowT:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[RowT]:
        for begin in range(0, len(self), 64):
            yield from self[begin : begin + 64]

    @overload
    def __getitem__(self, number: int) -> RowT: ...
    @overload
    def __getitem__(self, number: slice) -> list[RowT]: ...
    def __getitem__(self, number: int | slice) -> RowT | list[RowT]:
        found = self.dataset[number]
        if not isinstance(number, slice):
            return self._read(found)
        rows = zip(*found.values(), strict=True)
        return [self._read(dict(zip(found, row, strict=True))) for row in rows]


class ConversationDataset(ArrowRows[Item]):
    """Conversations and documents that `write_items` wrote."""

    columns: ClassVar = ["item", "source", "row"]

    @property
    def thinking(self) -> bool:
        """True if at least one answer of the table contains thoughts."""
        return bool(self.meta["thinking"])

    @property
    def signatures(self) -> NDArray[np.uint8]:
        """MinHash signature of each item, uint8 [N, 64]."""
        chunks = self.table.data.column("signature").chunks
        flat = [chunk.flatten().to_numpy() for chunk in chunks]
        return np.concatenate([np.zeros(0, np.uint8), *flat]).reshape(-1, BINS)[self.chosen]

    def _read(self, row: Mapping[str, Any]) -> Item:
        return from_values(json.loads(row["item"]), Origin(row["source"], row["row"]))


class Examples(ArrowRows[Example]):
    """Tokenized examples that `write_examples` wrote."""

    columns: ClassVar = ["input_ids", "labels", "source", "row", *PREFERENCE_COLUMNS]

    @property
    def dataset(self) -> Dataset:
        """The chosen rows; without the columns of preferences where they are of none."""
        paired = self.column("second").any() or (self.column("good") != NO_LABEL).any()
        rows = super().dataset
        return rows if paired else rows.remove_columns(PREFERENCE_COLUMNS)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, int64 [N], without reading the examples."""
        ids = self.table.data.column("input_ids")
        return pc.list_value_length(ids).to_numpy().astype(np.int64)[self.chosen]

    @property
    def trained(self) -> NDArray[np.int64]:
        """Supervised tokens of each example, int64 [N]."""
        return self.column("trained_tokens")

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence; 0 without examples."""
        second = self.column("second")
        return int(np.maximum(second, self.lengths - second).max(initial=0))

    def digest(self) -> str:
        """SHA-256 of all lengths, ids and loss masks in their order."""
        digest = hashlib.sha256(self.lengths.tobytes())
        table = self.table.data.table.select(["input_ids", "labels"])
        # Consecutive examples are hashed together: a million examples make about 50,000 runs.
        for run in np.split(self.chosen, np.flatnonzero(np.diff(self.chosen) != 1) + 1):
            rows = table.slice(run[0] if len(run) else 0, len(run))
            for chunk in rows.column("input_ids").chunks:
                digest.update(chunk.flatten().to_numpy())
            for chunk in rows.column("labels").chunks:
                digest.update(chunk.flatten().to_numpy() != IGNORE)
        for name, usual in (("second", 0), ("good", NO_LABEL)):
            values = self.column(name)
            if (values != usual).any():
                digest.update(values.tobytes())
        return digest.hexdigest()

    def _read(self, row: Mapping[str, Any]) -> Example:
        return to_example(row)


def write_items(
    path: Path, items: Iterable[tuple[Item, int]], meta: dict[str, Any]
) -> dict[str, Any]:
    """Write (item, index of its source) pairs; return `meta` and `thinking` after the last pair."""
    thinking = False
    lines = ((to_line(item), item, source) for item, source in items)

    def batches() -> Iterator[dict[str, Any]]:
        nonlocal thinking
        for block in _blocks(lines, lambda line: len(line[0])):
            texts, made, sources = zip(*block, strict=True)
            signatures = sign([content_of(item) for item in made])
            thinking = thinking or any(map(_thinks, made))
            yield {
                "item": texts,
                **_origins(made),
                "source_index": sources,
                "content_hash": [content_hash(item) for item in made],
                "prompt_hash": [_prompt_hash(item) for item in made],
                "signature": pa.FixedSizeListArray.from_arrays(signatures.ravel(), BINS),
            }

    _write(path, _ITEMS, batches())
    return {**meta, "thinking": thinking}


def write_examples(
    path: Path,
    encoded: Iterable[tuple[int, Sequence[Example]]],
    hashes: NDArray[np.uint64],
    log: IssueLog,
) -> dict[str, Any]:
    """Write (item index, its examples) pairs; return the faults of `log` after the last pair.

    Args:
        hashes: content hash of each item.
    """
    pairs = ((owner, example) for owner, examples in encoded for example in examples)

    def batches() -> Iterator[dict[str, Any]]:
        for block in _blocks(pairs, lambda pair: len(pair[1].input_ids)):
            owners, made = zip(*block, strict=True)
            trained = [example.trained_tokens for example in made]
            yield {
                **_columns(made),
                "content_hash": hashes[list(owners)],
                "item_index": owners,
                "trained_tokens": trained,
            }

    _write(path, _EXAMPLES, batches())
    return {"faults": log.as_dict()}


def _write(path: Path, schema: pa.Schema, batches: Iterable[dict[str, Any]]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        for batch in batches:
            out.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))


def _blocks(rows: Iterable[RowT], size: Callable[[RowT], int]) -> Iterator[list[RowT]]:
    """Group rows into blocks of about BATCH_SIZE."""
    block, total = [], 0
    for row in rows:
        block.append(row)
        total += size(row)
        if total >= BATCH_SIZE:
            yield block
            block, total = [], 0
    if block:
        yield block


def _origins(rows: Sequence[Item | Example]) -> dict[str, Any]:
    return {"source": [r.origin.source for r in rows], "row": [r.origin.row for r in rows]}


def _columns(examples: Sequence[Example]) -> dict[str, Any]:
    ids, labels = [e.input_ids for e in examples], [e.labels for e in examples]
    return {
        "input_ids": _lists(ids),
        "labels": _lists(labels),
        **_origins(examples),
        "second": [e.second for e in examples],
        "good": [NO_LABEL if e.good is None else int(e.good) for e in examples],
    }


def _lists(rows: Sequence[list[int]]) -> pa.ListArray:
    """Arrow lists of int32; `pa.array` takes ten times as long."""
    values = array("i")
    for row in rows:
        values.fromlist(row)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.asarray(values))


def as_dataset(examples: Sequence[Example]) -> Dataset:
    """Examples as an Arrow dataset with the columns of `Examples`, without those of preferences.

    That of prepared data is on disk; other examples are copied.
    """
    if isinstance(examples, Examples):
        return examples.dataset
    dataset = Dataset(pa.table(_columns(examples)))
    paired = any(e.second or e.good is not None for e in examples)
    return dataset if paired else dataset.remove_columns(PREFERENCE_COLUMNS)


def to_example(row: Mapping[str, Any]) -> Example:
    """Build the example of a row of `as_dataset`."""
    return Example(
        row["input_ids"],
        row["labels"],
        Origin(row["source"], row["row"]),
        row.get("second", 0),
        None if row.get("good", NO_LABEL) == NO_LABEL else bool(row["good"]),
        tuple(row.get("reference", ())),
    )


def content_of(item: Item) -> str:
    """Text of an item without its system turn, which many items share."""
    if isinstance(item, Conversation):
        turns = (*item.messages, *item.rejected)
        return "\n".join(m.content for m in turns if m.role != "system")
    return item.text


def _prompt_hash(item: Item) -> int:
    """Hash of the prompt of preference data, whose answers must not be split; else of all."""
    if isinstance(item, Document) or not (item.rejected or item.good is not None):
        return content_hash(item)
    return content_hash(Conversation(item.prompt, item.origin))


def _thinks(item: Item) -> bool:
    return isinstance(item, Conversation) and any(map(has_thoughts, item.messages))


def sequence_lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each sequence: two for a pair, one for any other example."""
    if isinstance(examples, Examples):
        second, lengths = examples.column("second"), examples.lengths
        parts = np.stack([np.where(second, second, lengths), lengths - second], axis=1).ravel()
        return parts[np.stack([lengths > 0, second > 0], axis=1).ravel()].tolist()
    return [len(part.input_ids) for example in examples for part in example.sequences]


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example; those on disk are not read."""
    if isinstance(examples, Examples):
        return examples.lengths.tolist()
    return [len(example.input_ids) for example in examples]
