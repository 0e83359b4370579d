"""Raw rows enter; their format is found by their columns, and conversations or documents leave.

A format is one row of FORMATS: its name, the columns it needs, and the function that reads a row.
The first whose columns are all present wins; the order is from the most to the least specific.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import DataError
from lorakit.records import Conversation, Document, Message, Role, Row

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}

Read = Callable[[Row], tuple[list[Message], str | None]]


class UnusableRow(Exception):
    """One row cannot be used; `kind` groups such rows in the report."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Format:
    """How one format is recognized (`needs`) and read; `about` is the reason shown to the user."""

    name: str
    needs: tuple[str, ...]
    read: Read
    about: str


@dataclass(frozen=True, slots=True)
class FormatGuess:
    """The format chosen for a source, and why; `columns` maps parts to the user's own columns."""

    format: Format
    columns: Mapping[str, str]
    reason: str


def guess_format(rows: Sequence[Row], columns: Mapping[str, str]) -> FormatGuess:
    """Choose the format from the columns of the first rows.

    Args:
        rows: some rows of one source, at least one.
        columns: part -> column name, from the recipe.

    Raises:
        DataError: no format fits (lists the columns found and suggests `columns:`), a column that
            `columns` names is absent, or the rows are preference data.
    """
    source = rows[0].origin.source
    found = list(dict.fromkeys(key for row in rows for key in row.values))
    for part, column in columns.items():
        if column not in found:
            raise DataError(
                f"{source}: columns: {part}: there is no column {column!r} "
                f"(found: {', '.join(found) or 'none'})"
            )
    names = (set(found) - set(columns.values())) | set(columns)
    if {"chosen", "rejected"} <= names:
        raise DataError(
            f"{source}: this is preference data (columns chosen and rejected)",
            hint="supervised fine-tuning needs one answer a row; for example "
            "columns: {prompt: prompt, completion: chosen} trains on the preferred ones",
        )
    for candidate in FORMATS:
        if set(candidate.needs) <= names:
            reason = f"columns {', '.join(candidate.needs)}"
            return FormatGuess(candidate, columns, reason)
    raise _unrecognized(source, found)


def to_record(row: Row, guess: FormatGuess, system: str | None) -> Conversation | Document:
    """One row in lorakit's own form.

    Raises:
        UnusableRow: an empty or missing part, an unknown role, turns out of order.
    """
    values = dict(row.values)
    for part, column in guess.columns.items():
        values[part] = values.pop(column, None)
    messages, text = guess.format.read(Row(values, row.origin))
    if text is not None:
        return Document(text, row.origin)
    if system and (not messages or messages[0].role != "system"):
        messages = [Message("system", system), *messages]
    _check_turns(messages)
    return Conversation(tuple(messages), row.origin)


def _check_turns(messages: Sequence[Message]) -> None:
    turns = [m for m in messages if m.role != "system"]
    if any(m.role == "system" for m in messages[1:]):
        raise UnusableRow("a system turn that is not the first")
    if not turns or all(m.role != "assistant" for m in turns):
        raise UnusableRow("no answer in the row")
    if turns[0].role != "user":
        raise UnusableRow("the first turn is not the user's")
    for before, after in zip(turns, turns[1:], strict=False):
        if before.role == after.role:
            raise UnusableRow(f"two {after.role} turns in a row")


def _string(row: Row, column: str, part: str) -> str:
    """A non-empty string of one column."""
    value = row.values.get(column)
    if value is None:
        raise UnusableRow(f"{part} is missing")
    if isinstance(value, (bool, int, float)):
        value = str(value)
    if not isinstance(value, str):
        raise UnusableRow(f"{part} is a {type(value).__name__}, not text")
    if not value.strip():
        raise UnusableRow(f"{part} is empty")
    return value


def _pair(question: str, answer: str) -> Read:
    def read(row: Row) -> tuple[list[Message], None]:
        messages = _optional_system(row)
        messages.append(Message("user", _string(row, question, question)))
        messages.append(Message("assistant", _string(row, answer, answer)))
        return messages, None

    return read


def _optional_system(row: Row) -> list[Message]:
    value = row.values.get("system")
    return [Message("system", value)] if isinstance(value, str) and value.strip() else []


def _instruction(answer: str) -> Read:
    def read(row: Row) -> tuple[list[Message], None]:
        question = _string(row, "instruction", "instruction")
        for extra in ("input", "context"):
            value = row.values.get(extra)
            if isinstance(value, str) and value.strip():
                question = f"{question}\n\n{value}"
        messages = _optional_system(row)
        messages.append(Message("user", question))
        messages.append(Message("assistant", _string(row, answer, answer)))
        return messages, None

    return read


def _prompt_completion(answer: str) -> Read:
    def read(row: Row) -> tuple[list[Message], None]:
        prompt, completion = row.values.get("prompt"), row.values.get(answer)
        if isinstance(prompt, list) and isinstance(completion, list):
            return _turns([*prompt, *completion], "role", "content"), None
        return _pair("prompt", answer)(row)

    return read


def _query_response(row: Row) -> tuple[list[Message], None]:
    messages = _optional_system(row)
    history = row.values.get("history") or []
    if not isinstance(history, list):
        raise UnusableRow("history is not a list of [query, response] pairs")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            raise UnusableRow("history is not a list of [query, response] pairs")
        messages += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
    messages.append(Message("user", _string(row, "query", "query")))
    messages.append(Message("assistant", _string(row, "response", "response")))
    return messages, None


def _messages(row: Row) -> tuple[list[Message], None]:
    return _turns(row.values["messages"], "role", "content"), None


def _sharegpt(row: Row) -> tuple[list[Message], None]:
    turns = row.values["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else {}
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    return _optional_system(row) + _turns(turns, *keys), None


def _turns(turns: Any, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise UnusableRow("no turns in the row")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise UnusableRow(f"a turn is a {type(turn).__name__}, not an object")
        role = ROLES.get(str(turn.get(role_key)).lower())
        if role is None:
            raise UnusableRow(f"unknown role {str(turn.get(role_key))[:20]!r}")
        messages.append(Message(role, _content(turn.get(text_key), role)))
    return messages


def _content(value: Any, role: Role) -> str:
    if isinstance(value, list):  # OpenAI content parts
        parts = [p.get("text") for p in value if isinstance(p, dict) and p.get("type") == "text"]
        if len(parts) != len(value) or not all(isinstance(p, str) for p in parts):
            raise UnusableRow("a content part that is not text")
        value = "".join(p for p in parts if isinstance(p, str))
    if not isinstance(value, str):
        raise UnusableRow(f"a {role} turn without text")
    if not value.strip():
        raise UnusableRow(f"an empty {role} turn")
    return value


def _text(row: Row) -> tuple[list[Message], str]:
    return [], _string(row, "text", "text")


FORMATS: tuple[Format, ...] = (
    Format("openai messages", ("messages",), _messages, "role and content"),
    Format("sharegpt", ("conversations",), _sharegpt, "from and value"),
    Format("instruction/response", ("instruction", "response"), _instruction("response"), ""),
    Format("alpaca", ("instruction", "output"), _instruction("output"), "with optional input"),
    Format("prompt/completion", ("prompt", "completion"), _prompt_completion("completion"), ""),
    Format("prompt/response", ("prompt", "response"), _prompt_completion("response"), ""),
    Format("question/answer", ("question", "answer"), _pair("question", "answer"), ""),
    Format("query/response", ("query", "response"), _query_response, "with optional history"),
    Format("input/output", ("input", "output"), _pair("input", "output"), ""),
    Format("plain text", ("text",), _text, "documents, all tokens trained"),
)


def _unrecognized(source: str, found: Sequence[str]) -> DataError:
    texts = [c for c in found if c][:2]
    example = (
        f"columns: {{instruction: {texts[0]}, response: {texts[1]}}}"
        if len(texts) == 2
        else "columns: {instruction: MY_QUESTION, response: MY_ANSWER}"
    )
    known = "; ".join(" + ".join(f.needs) for f in FORMATS)
    return DataError(
        f"{source}: no known format in its columns (found: {', '.join(found) or 'none'})\n"
        f"  known: {known}",
        hint=f"say which column is which in the recipe, for example {example}",
    )
