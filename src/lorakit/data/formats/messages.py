"""Convert the cells of one row to turns, tool calls and tool schemas.

Tool calls and schemas may be JSON text or objects, bare or wrapped. A call is converted to
{"type": "function", "function": {"name", "arguments": object}}, a schema to
{"type": "function", "function": {...}}, as chat templates take them. Faults name the row and the
column.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.issues import RowError
from lorakit.types import Message, Origin, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# Names that datasets use for `reasoning_content` of the templates.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RowFields:
    """Cells of one row under their final names; faults name the row and the column."""

    values: Mapping[str, Any]
    origin: Origin
    columns: Mapping[str, str]

    def fault(self, kind: str, detail: str, hint: str | None = None) -> RowError:
        return RowError(kind, self.origin, detail, hint)

    def text(self, name: str) -> str:
        """Text of a required column.

        Raises:
            RowError: the column is missing, null, blank or not text.
        """
        value = self.optional(name)
        if not value.strip():
            state = "empty" if name in self.values else "missing"
            if name in self.values and self.values[name] is None:
                state = "null"
            raise self.fault(f"no {name}", f"column {self._shown(name)} is {state}")
        return value

    def optional(self, name: str) -> str:
        """Text of a column, or "" if it is missing, null or empty."""
        value = self.values.get(name)
        return "" if value is None else self.as_text(value, f"column {self._shown(name)}")

    def as_text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            raise self.fault(
                "wrong type",
                f"{place} holds {shown_value(value)}, expected a text",
                f'write it as the text to be learned: "{value}"' if is_number else None,
            )
        if _SURROGATE.search(value):
            raise self.fault("broken characters", f"{place} holds half a surrogate pair")
        return value

    def _shown(self, name: str) -> str:
        column = self.columns.get(name, name)
        return name if column == name else f"{column} ({name})"


def parse_messages(cells: RowFields, column: str) -> list[Message]:
    """Parse the turns of a list column with role/content or from/value keys."""
    value = cells.values.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        # CSV and some Parquet files carry the list as JSON text.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise cells.fault("broken turns", f"column {column} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = _as_list(value)
    if not isinstance(value, list):
        state = "missing" if column not in cells.values else shown_value(value)
        raise cells.fault("wrong type", f"column {column} is {state}, expected a list of turns")
    if not value:
        raise cells.fault("no turns", f"column {column} is an empty list")
    turns = [_turn(cells, turn, f"{column}[{index}]") for index, turn in enumerate(value)]
    # Chat exports write "" if no system text was set: such a turn is dropped.
    kept = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    return with_system(kept, cells.optional("system") if column == "conversations" else "")


def _as_list(value: dict[Any, Any]) -> Any:
    """Convert an object of lists, as `datasets` stores a Sequence of objects, to a list."""
    sizes = {len(v) if isinstance(v, list) else -1 for v in value.values()}
    if len(sizes) != 1 or min(sizes) < 0:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _turn(cells: RowFields, turn: Any, path: str) -> Message:
    if not isinstance(turn, dict):
        raise cells.fault("wrong type", f"{path} is {shown_value(turn)}, expected an object")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise cells.fault(
            "unknown role", f"{path} has the role {shown_value(name)}; known: {', '.join(ROLES)}"
        )
    path = f"{path} ({role})"
    content = turn["content"] if "content" in turn else turn.get("value")
    if isinstance(content, list):
        content = "".join(_content_text(cells, part, path) for part in content)
    extra = _extra(cells, turn, role, path)
    if str(name).strip().lower() == "function_call":
        # LLaMA-Factory's sharegpt: the call is the text of a separate turn.
        extra["tool_calls"], content = parse_tool_calls(content, path, cells.fault), ""
    calls = "tool_calls" in extra
    if content is None and role != "system" and not calls:
        raise cells.fault(f"empty {role} turn", f"{path} has no content")
    content = "" if content is None else cells.as_text(content, path)
    # A function may return an empty text, and chat exports write "" if no system text was set.
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise cells.fault(f"empty {role} turn", f"{path} is empty")
    return Message(role, content, extra, _trained(cells, turn, role, path))


def _extra(cells: RowFields, turn: Mapping[str, Any], role: Role, path: str) -> dict[str, Any]:
    """Collect the other keys of a turn that chat templates read."""
    extra: dict[str, Any] = {}
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls:
        if role != "assistant":
            raise cells.fault("wrong type", f"{path} calls tools: only an assistant turn can")
        extra["tool_calls"] = parse_tool_calls(calls, path, cells.fault)
    thoughts = next((turn[key] for key in _THOUGHTS if turn.get(key)), None)
    if role == "assistant" and thoughts is not None:
        extra["reasoning_content"] = cells.as_text(thoughts, f"{path}.reasoning_content")
    for key in ("tool_call_id", "name"):
        if turn.get(key) is not None:
            extra[key] = cells.as_text(turn[key], f"{path}.{key}")
    return extra


def _trained(cells: RowFields, turn: Mapping[str, Any], role: Role, path: str) -> bool:
    """Return False for a turn with `train: false` or `weight: 0`, which gets no loss."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise cells.fault("wrong type", f"{path}.train is {shown_value(train)}, not true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise cells.fault(
            "unknown weight",
            f"{path}.weight is {shown_value(weight)}, expected 1 (trained) or 0 (not trained)",
        )
    trained = {bool(value) for value in (train, weight) if value is not None}
    if len(trained) == 2:
        raise cells.fault("unknown weight", f"{path}: train and weight contradict each other")
    if role != "assistant" and True in trained:
        raise cells.fault("unknown weight", f"{path}: only assistant turns can be trained")
    return False not in trained


def _content_text(cells: RowFields, part: Any, path: str) -> str:
    """Text of one content part of the OpenAI form, {"type": "text", "text": ...}."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text":
        return cells.as_text(part.get("text"), f"{path}.text")
    part_type = part.get("type") if isinstance(part, dict) else part
    raise cells.fault(
        "not text", f"{path} holds a part of type {shown_value(part_type)}, expected text"
    )


def history_of(cells: RowFields) -> list[Message]:
    """Parse the earlier turns of query/response rows: [[question, answer], ...]."""
    value = cells.values.get("history")
    if not value:
        return []
    turns: list[Message] = []
    for index, pair in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise cells.fault(
                "wrong type",
                f"history[{index}] is {shown_value(pair)}, expected [question, answer]",
            )
        for role, cell in zip(("user", "assistant"), pair, strict=True):
            text = cells.as_text(cell, f"history[{index}]")
            if not text.strip():
                raise cells.fault(f"empty {role} turn", f"history[{index}]: {role} is empty")
            turns.append(Message(ROLES[role], text))
    return turns


def with_system(turns: list[Message], system: str) -> list[Message]:
    """Prepend a system turn, unless `system` is blank or the turns begin with one."""
    present = bool(turns) and turns[0].role == "system"
    return [Message("system", system), *turns] if system.strip() and not present else turns


# (kind of fault, detail) -> the error of the row.
MakeFault = Callable[[str, str], RowError]


def parse_tool_calls(value: Any, place: str, fault: MakeFault) -> list[dict[str, Any]]:
    """Parse the tool calls of one turn: one or several, as objects or as JSON text."""
    value = _parsed(value, place, fault, "broken tool call")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise fault("broken tool call", f"{place} holds an empty list of tool calls")
    return [_call(call, f"{place}.tool_calls[{n}]", fault) for n, call in enumerate(calls)]


def _call(value: Any, path: str, fault: MakeFault) -> dict[str, Any]:
    call = _parsed(value, path, fault, "broken tool call")
    inner = call.get("function", call) if isinstance(call, dict) else call
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise fault(
            "broken tool call",
            f'{path} is {shown_value(value)}, expected {{"name": ..., "arguments": {{...}}}}',
        )
    arguments = inner.get("arguments", inner.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    arguments = _parsed(arguments, f"{path}.arguments", fault, "broken tool call")
    if not isinstance(arguments, dict):
        raise fault(
            "broken tool call",
            f"{path}.arguments is {shown_value(arguments)}, expected an object of arguments",
        )
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_tools(value: Any, fault: MakeFault) -> tuple[dict[str, Any], ...]:
    """Parse the cell `tools`: the schemas of the functions that a conversation may call."""
    if value is None or value == "":
        return ()
    value = _parsed(value, "column tools", fault, "broken tools")
    tools = value if isinstance(value, list) else [value]
    return tuple(_tool(tool, f"tools[{n}]", fault) for n, tool in enumerate(tools))


def _tool(value: Any, path: str, fault: MakeFault) -> dict[str, Any]:
    tool = _parsed(value, path, fault, "broken tools")
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise fault(
            "broken tools", f"{path} is {shown_value(value)}, expected a schema with a name"
        )
    return {"type": "function", "function": inner}


def _parsed(value: Any, path: str, fault: MakeFault, kind: str) -> Any:
    """Parse JSON text; return other values unchanged if they can be written as JSON."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise fault(kind, f"{path} is {shown_value(value)}: not JSON: {error}") from error
    return value


def shown_value(value: Any) -> str:
    """Shorten a value for a message; `reprlib` limits depth, where `repr` would overflow."""
    return "null" if value is None else reprlib.repr(value)
