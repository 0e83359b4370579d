"""Read content parts: those of OpenAI (chat and responses), Anthropic, Mistral and Gemini."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.formats.cells import RowFields, shown_value
from lorakit.types import Message, Role

_TEXT = ("text", "input_text", "output_text")
_THOUGHTS = ("thinking", "reasoning", "reasoning_text", "summary_text")


@dataclass(slots=True)
class Parts:
    """Content of the parts of one turn, with the results that come before it."""

    text: str = ""
    thoughts: str = ""
    calls: list[Any] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


def read_parts(cells: RowFields, parts: Sequence[Any], role: Role, path: str) -> Parts:
    """Sort the parts of a turn by what they are.

    Raises:
        RowError: a part is not a text, thought, call or result (an image, a file), or it is a call
            or thought outside of an assistant turn.
    """
    found = Parts()
    for part in parts:
        if isinstance(part, str):
            found.text += part
            continue
        if not isinstance(part, dict):
            raise _not_text(cells, part, path)
        # Arrow gives every part the keys of all kinds: those of others are null.
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type", _kind_of(part))
        if kind in _TEXT and part.get("thought") is not True:
            found.text += _text(cells, part, path)
        elif kind == "refusal":
            found.text += cells.as_text(part.get("refusal"), f"{path}.refusal")
        elif role == "assistant" and (kind in _THOUGHTS or part.get("thought") is True):
            found.thoughts += _thought(cells, part, path)
        elif role == "assistant" and kind in ("tool_use", "functionCall"):
            found.calls.append(part.get("functionCall", part))
        elif role in ("user", "tool") and kind in ("tool_result", "functionResponse"):
            found.results.append(_result(cells, part, path))
        else:
            raise _not_text(cells, part, path)
    return found


def _kind_of(part: dict[str, Any]) -> str | None:
    return next((key for key in ("functionCall", "functionResponse", "text") if key in part), None)


def _text(cells: RowFields, part: dict[str, Any], path: str) -> str:
    value = next((part[key] for key in ("text", "value", "content") if key in part), None)
    return cells.as_text(value, f"{path}.text")


def _thought(cells: RowFields, part: dict[str, Any], path: str) -> str:
    keys = ("thinking", "reasoning", "text", "content")
    value = next((part[key] for key in keys if key in part), None)
    if isinstance(value, list):  # Mistral's thoughts are parts themselves
        return read_parts(cells, value, "user", path).text
    return cells.as_text(value, f"{path}.thinking")


def _result(cells: RowFields, part: dict[str, Any], path: str) -> Message:
    inner = part.get("functionResponse", part)
    value = inner.get("content", inner.get("response", ""))
    if isinstance(value, list):
        value = read_parts(cells, value, "assistant", path).text
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    extra = {"tool_call_id": part.get("tool_use_id"), "name": inner.get("name")}
    return Message("tool", value, {k: v for k, v in extra.items() if isinstance(v, str)})


def _not_text(cells: RowFields, part: Any, path: str) -> Exception:
    kind = part.get("type") or next(iter(part), None) if isinstance(part, dict) else part
    return cells.fault(
        "not text", f"{path} holds a part of type {shown_value(kind)}, expected text",
        "only texts, thoughts, tool calls and tool results can be trained: leave the row out, or "
        "write the part as text",
    )  # fmt: skip
