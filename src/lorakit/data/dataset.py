"""Datasets of conversations, documents and tokenized examples on disk, read by index.

Items are stored as JSON lines: OpenAI's `{"messages": [...], "tools": [...]}` or `{"text": ...}`,
with `"from"` for the source row. The cache of a large data set and the held-out rows of a run share
this form.

A million short chats are 6 GB as Python objects. Here they stay in files, and memory holds 100
bytes for each: its offset, its row number, its content hash and its MinHash signature.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.data.chat_template.thoughts import has_thoughts
from lorakit.data.dedup import Signer
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
    return Conversation(turns, origin, tuple(values.get("tools", ())))


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


# Tokens to collect before a write.
_AT_ONCE = 2**20
ItemT = TypeVar("ItemT")
_ITEMS, _TOKENS, _TRAINED = "items.jsonl", "tokens.int32", "trained.uint8"


def _save(folder: Path, meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "meta.json").write_text(json.dumps(meta))


class ConversationDataset(Sequence[Item]):
    """Conversations and documents in a folder that `write_items` filled.

    Attributes:
        content_hashes: content hash of each item, uint64 [N].
        signatures: MinHash signature of each item, uint8 [N, 64].
        sources: index of the source of each item, int32 [N].
        meta: the `meta` given to `write_items`, `names` of the files and `thinking`.
    """

    def __init__(self, folder: Path, key: str | None) -> None:
        self.key = key
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        load = {p.stem: np.load(p) for p in folder.glob("*.npy")}
        self.content_hashes, self.signatures, self.sources = (
            load[n] for n in ("content_hashes", "signatures", "sources")
        )
        self._begins, self._names, self._rows = (load[n] for n in ("begins", "names", "rows"))
        self._path = folder / _ITEMS
        self._bytes = (
            np.memmap(self._path, np.uint8, "r") if len(self._rows) else np.zeros(0, np.uint8)
        )

    @property
    def thinking(self) -> bool:
        """True if at least one answer contains thoughts."""
        return bool(self.meta["thinking"])

    def origin(self, number: int) -> Origin:
        """File and row of item `number`."""
        return Origin(self.meta["names"][self._names[number]], int(self._rows[number]))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Item]:
        names, origins = self.meta["names"], zip(self._names, self._rows, strict=True)
        with self._path.open("rb") as handle:
            for line, (name, row) in zip(handle, origins, strict=True):
                yield from_values(json.loads(line), Origin(names[name], int(row)))

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        index = range(len(self))[number]
        line = self._bytes[self._begins[index] : self._begins[index + 1]].tobytes()
        return from_values(json.loads(line), self.origin(index))


def write_items(folder: Path, items: Iterable[tuple[Item, int]], meta: dict[str, Any]) -> None:
    """Write (item, index of its source) pairs to disk; `meta` is read after the last pair."""
    begins, rows, content_hashes = array("q", [0]), array("q"), array("Q")
    names, sources = array("i"), array("i")
    file_indices: dict[str, int] = {}
    signer, thinking = Signer(), False
    with (folder / _ITEMS).open("wb") as handle:
        for item, source in items:
            line = to_line(item).encode() + b"\n"
            handle.write(line)
            begins.append(begins[-1] + len(line))
            rows.append(item.origin.row)
            content_hashes.append(content_hash(item))
            names.append(file_indices.setdefault(item.origin.source, len(file_indices)))
            sources.append(source)
            signer.add(content_of(item))
            thinking = thinking or (
                isinstance(item, Conversation) and any(map(has_thoughts, item.messages))
            )
    arrays: dict[str, NDArray[Any]] = {
        "begins": np.asarray(begins, np.int64),
        "rows": np.asarray(rows, np.int64),
        "content_hashes": np.asarray(content_hashes, np.uint64),
        "names": np.asarray(names, np.int32),
        "sources": np.asarray(sources, np.int32),
        "signatures": signer.signatures(),
    }
    _save(folder, {**meta, "names": list(file_indices), "thinking": thinking}, arrays)


def content_of(item: Item) -> str:
    """Text of an item without its system turn, which many items share."""
    if isinstance(item, Conversation):
        return "\n".join(m.content for m in item.messages if m.role != "system")
    return item.text


class TokenizedDataset:
    """Tokenized examples in a folder that `write_examples` filled.

    Attributes:
        source_rows: index of the item that each example was made from, int32 [N], ascending.
        lengths, trained: tokens and supervised tokens of each example, int64 [N].
        faults: the faults counted while the examples were made.
    """

    def __init__(self, folder: Path, items: ConversationDataset) -> None:
        self.items = items
        meta = json.loads((folder / "meta.json").read_text())
        self.faults = IssueLog.from_dict(meta["faults"])
        load = {p.stem: np.load(p) for p in folder.glob("*.npy")}
        self.source_rows, self.trained, self._begins = (
            load[n] for n in ("owners", "trained", "begins")
        )
        self.lengths = np.diff(self._begins)
        self._ids = np.memmap(folder / _TOKENS, np.int32, "r")
        self._mask = np.memmap(folder / _TRAINED, np.uint8, "r")

    def example(self, number: int) -> Example:
        tokens = slice(self._begins[number], self._begins[number + 1])
        ids = self._ids[tokens]
        labels = np.where(self._mask[tokens], ids, IGNORE)
        return Example(ids.tolist(), labels.tolist(), self.items.origin(self.source_rows[number]))

    def digest(self, chosen: NDArray[np.int64]) -> str:
        """SHA-256 of the ids and labels of some examples, in their order."""
        digest = hashlib.sha256(self.lengths[chosen].tobytes())
        # Consecutive examples are hashed together: a million examples make about 50,000 runs.
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
            if len(run):
                tokens = slice(self._begins[run[0]], self._begins[run[-1] + 1])
                digest.update(self._ids[tokens].data)
                digest.update(self._mask[tokens].data)
        return digest.hexdigest()


def write_examples(
    folder: Path, encoded: Iterable[tuple[int, Sequence[Example]]], log: IssueLog
) -> None:
    """Write (item index, its examples) pairs to disk; `log` is read after the last pair."""
    begins, owners, trained = array("q", [0]), array("i"), array("q")
    ids, labels = array("i"), array("i")
    with (folder / _TOKENS).open("wb") as tokens, (folder / _TRAINED).open("wb") as mask:

        def flush() -> None:
            ids.tofile(tokens)
            mask.write((np.asarray(labels, np.int32) != IGNORE).tobytes())
            del ids[:], labels[:]

        for owner, examples in encoded:
            for example in examples:
                ids.extend(example.input_ids)
                labels.extend(example.labels)
                begins.append(begins[-1] + len(example.input_ids))
                owners.append(owner)
                trained.append(example.trained_tokens)
            if len(ids) > _AT_ONCE:
                flush()
        flush()
    arrays: dict[str, NDArray[Any]] = {
        "begins": np.asarray(begins, np.int64),
        "owners": np.asarray(owners, np.int32),
        "trained": np.asarray(trained, np.int64),
    }
    _save(folder, {"faults": log.as_dict()}, arrays)


class Subset(Sequence[ItemT]):
    """Rows of a dataset chosen by index, int64 [N]; `_read` loads one of them."""

    def __init__(self, chosen: NDArray[np.int64]) -> None:
        self.chosen = chosen

    def _read(self, index: int) -> ItemT:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, number: int) -> ItemT: ...
    @overload
    def __getitem__(self, number: slice) -> list[ItemT]: ...
    def __getitem__(self, number: int | slice) -> ItemT | list[ItemT]:
        if isinstance(number, slice):
            return [self._read(int(i)) for i in self.chosen[number]]
        return self._read(int(self.chosen[number]))


class Examples(Subset[Example]):
    """Chosen examples of a dataset, in any order; an example may occur more than once."""

    def __init__(self, dataset: TokenizedDataset, chosen: NDArray[np.int64]) -> None:
        super().__init__(chosen)
        self._dataset = dataset

    def _read(self, index: int) -> Example:
        return self._dataset.example(index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, int64 [N], without reading the examples."""
        return self._dataset.lengths[self.chosen]

    @property
    def trained(self) -> NDArray[np.int64]:
        """Supervised tokens of each example, int64 [N]."""
        return self._dataset.trained[self.chosen]

    @property
    def content_hashes(self) -> NDArray[np.uint64]:
        """Content hash of the item of each example, uint64 [N]."""
        return self._dataset.items.content_hashes[self._dataset.source_rows[self.chosen]]

    def origin(self, number: int) -> Origin:
        """File and row of example `number`, without reading it."""
        return self._dataset.items.origin(int(self._dataset.source_rows[self.chosen[number]]))

    def digest(self) -> str:
        """SHA-256 of all ids and labels in their order."""
        return self._dataset.digest(self.chosen)


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example; those on disk are not read."""
    if isinstance(examples, Examples):
        return [int(size) for size in examples.lengths]
    return [len(example.input_ids) for example in examples]


class Items(Subset[Item]):
    """Chosen items of a dataset, in the order of the dataset."""

    def __init__(self, dataset: ConversationDataset, chosen: NDArray[np.int64]) -> None:
        super().__init__(chosen)
        self._dataset = dataset

    def _read(self, index: int) -> Item:
        return self._dataset[index]
