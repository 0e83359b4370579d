"""Conversations and documents enter as objects or as JSON lines; they leave as the other.

One form for the cache of a large data set and for the held-out rows that a run keeps: OpenAI's
`{"messages": [...], "tools": [...]}` or `{"text": ...}`, with the row it came `"from"`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.data.read import read_rows
from lorakit.errors import DataError
from lorakit.records import Conversation, Document, Message, Origin, Row
from lorakit.run_dir import write_text

Item = Conversation | Document


def to_line(item: Item) -> str:
    """One JSON object without line end."""
    if isinstance(item, Document):
        row: dict[str, Any] = {"text": item.text}
    else:
        row = {"messages": [_turn(message) for message in item.messages]}
        if item.tools:
            row["tools"] = list(item.tools)
    row["from"] = str(item.origin)
    return json.dumps(row, ensure_ascii=False)


def from_values(values: dict[str, Any], origin: Origin) -> Item:
    """The item of one parsed line.

    Raises:
        KeyError, TypeError: it is no line that `to_line` wrote.
    """
    if "text" in values:
        return Document(values["text"], origin)
    turns = tuple(_message(turn) for turn in values["messages"])
    return Conversation(turns, origin, tuple(values.get("tools", ())))


def write_validation(path: Path, items: Sequence[Item]) -> None:
    """Keep held-out rows as JSON lines."""
    write_text(path, "".join(to_line(item) + "\n" for item in items))


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
            found.append(from_values(row.values, _origin(row)))
        except (KeyError, TypeError) as error:
            raise DataError(f"{row.origin}: not a held-out row as lorakit writes it") from error
    return found


def _turn(message: Message) -> dict[str, Any]:
    return message.as_dict() if message.train else {**message.as_dict(), "train": False}


def _message(turn: dict[str, Any]) -> Message:
    if len(turn) == 2:
        return Message(turn["role"], turn["content"])
    extra = {k: v for k, v in turn.items() if k not in ("role", "content", "train")}
    return Message(turn["role"], turn["content"], extra, turn.get("train", True))


def _origin(row: Row) -> Origin:
    source, _, number = str(row.values.get("from", row.origin)).rpartition(":")
    return Origin(source, int(number)) if number.isdigit() else Origin(source, row.origin.row)
