"""The cells of one row enter; its turns leave, or a fault that names the row and the column.

Tool calls and schemas as datasets spell them enter; they leave as chat templates take them.

A call leaves as {"type": "function", "function": {"name", "arguments": object}}, a schema as
{"type": "function", "function": {...}}, whether a row had them as JSON text or as objects, bare or
wrapped.
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
# Other names that datasets give to what templates call `reasoning_content`.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RowFields:
    """The cells of one row under their final names; each getter names the row and the column."""

    values: Mapping[str, Any]
    origin: Origin
    columns: Mapping[str, str]

    def fault(self, kind: str, detail: str, hint: str | None = None) -> RowError:
        return RowError(kind, self.origin, detail, hint)

    def text(self, name: str) -> str:
        """The text of a column that must hold some."""
        value = self.optional(name)
        if not value.strip():
            state = "empty" if name in self.values else "missing"
            if name in self.values and self.values[name] is None:
                state = "null"
            raise self.fault(f"no {name}", f"column {self._shown(name)} is {state}")
        return value

    def optional(self, name: str) -> str:
        """The text of a column that may be missing, null or empty (then "")."""
        value = self.values.get(name)
        return "" if value is None else self.as_text(value, f"column {self._shown(name)}")

    def as_text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            raise self.fault(
                "wrong type",
                f"{place} holds {shown_value(value)} where a text is expected",
                f'write it as the text it shall be learned as: "{value}"' if number else None,
            )
        if _SURROGATE.search(value):
            raise self.fault("broken characters", f"{place} holds half a surrogate pair")
        return value

    def _shown(self, name: str) -> str:
        column = self.columns.get(name, name)
        return name if column == name else f"{column} ({name})"


def parse_messages(cells: RowFields, column: str) -> list[Message]:
    """The turns of a list column, in role/content or from/value spelling."""
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
    turns = [_turn(cells, turn, f"{column}[{number}]") for number, turn in enumerate(value)]
    # Chat exports write "" where no system text was set: that is no turn.
    made = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    return with_system(made, cells.optional("system") if column == "conversations" else "")


def _as_list(value: dict[Any, Any]) -> Any:
    """`datasets` stores a Sequence of objects as an object of lists: {"role": [..], ...}."""
    sizes = {len(v) if isinstance(v, list) else -1 for v in value.values()}
    if len(sizes) != 1 or min(sizes) < 0:
        return value
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


def _turn(cells: RowFields, turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise cells.fault("wrong type", f"{place} is {shown_value(turn)}, expected an object")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise cells.fault(
            "unknown role", f"{place} has the role {shown_value(name)}; known: {', '.join(ROLES)}"
        )
    place = f"{place} ({role})"
    content = turn["content"] if "content" in turn else turn.get("value")
    if isinstance(content, list):
        content = "".join(_part(cells, part, place) for part in content)
    extra = _extra(cells, turn, role, place)
    if str(name).strip().lower() == "function_call":
        # LLaMA-Factory's sharegpt: the call is the text of a turn of its own.
        extra["tool_calls"], content = parse_tool_calls(content, place, cells.fault), ""
    calls = "tool_calls" in extra
    if content is None and role != "system" and not calls:
        raise cells.fault(f"empty {role} turn", f"{place} has no content")
    content = "" if content is None else cells.as_text(content, place)
    # A function may give nothing back, and chat exports write "" where no system text was set.
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise cells.fault(f"empty {role} turn", f"{place} is empty")
    return Message(role, content, extra, _trained(cells, turn, role, place))


def _extra(cells: RowFields, turn: Mapping[str, Any], role: Role, place: str) -> dict[str, Any]:
    """The other keys of a turn that chat templates read."""
    found: dict[str, Any] = {}
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls:
        if role != "assistant":
            raise cells.fault("wrong type", f"{place} calls tools: only an assistant turn can")
        found["tool_calls"] = parse_tool_calls(calls, place, cells.fault)
    thoughts = next((turn[key] for key in _THOUGHTS if turn.get(key)), None)
    if role == "assistant" and thoughts is not None:
        found["reasoning_content"] = cells.as_text(thoughts, f"{place}.reasoning_content")
    for key in ("tool_call_id", "name"):
        if turn.get(key) is not None:
            found[key] = cells.as_text(turn[key], f"{place}.{key}")
    return found


def _trained(cells: RowFields, turn: Mapping[str, Any], role: Role, place: str) -> bool:
    """False where the turn's own `train: false` or `weight: 0` leaves it out of the loss."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise cells.fault("wrong type", f"{place}.train is {shown_value(train)}, not true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise cells.fault(
            "unknown weight",
            f"{place}.weight is {shown_value(weight)}: a turn is trained (1) or not (0), nothing "
            "between",
        )
    wanted = {bool(value) for value in (train, weight) if value is not None}
    if len(wanted) == 2:
        raise cells.fault("unknown weight", f"{place}: train and weight say opposite things")
    if role != "assistant" and True in wanted:
        raise cells.fault("unknown weight", f"{place}: only assistant turns can be trained")
    return False not in wanted


def _part(cells: RowFields, part: Any, place: str) -> str:
    """The text of one content part of the OpenAI form: {"type": "text", "text": ...}."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text":
        return cells.as_text(part.get("text"), f"{place}.text")
    kind = part.get("type") if isinstance(part, dict) else part
    raise cells.fault("not text", f"{place} holds a part of kind {shown_value(kind)}, not text")


def history_of(cells: RowFields) -> list[Message]:
    """Earlier turns of query/response rows: [[question, answer], ...]."""
    value = cells.values.get("history")
    if not value:
        return []
    turns: list[Message] = []
    for number, pair in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise cells.fault(
                "wrong type", f"history[{number}] is no [question, answer]: {shown_value(pair)}"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            made = cells.as_text(text, f"history[{number}]")
            if not made.strip():
                raise cells.fault(f"empty {role} turn", f"history[{number}]: {role} is empty")
            turns.append(Message(ROLES[role], made))
    return turns


def with_system(turns: list[Message], system: str) -> list[Message]:
    """The turns led by `system`, unless it is blank or they bring their own."""
    own = bool(turns) and turns[0].role == "system"
    return [Message("system", system), *turns] if system.strip() and not own else turns


# (kind, detail) -> the fault of that row.
MakeFault = Callable[[str, str], RowError]


def parse_tool_calls(value: Any, place: str, fault: MakeFault) -> list[dict[str, Any]]:
    """The tool calls of one turn: one or several, as objects or as JSON text."""
    value = _parsed(value, place, fault, "broken tool call")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise fault("broken tool call", f"{place} holds an empty list of tool calls")
    return [_call(call, f"{place}.tool_calls[{n}]", fault) for n, call in enumerate(calls)]


def _call(value: Any, place: str, fault: MakeFault) -> dict[str, Any]:
    call = _parsed(value, place, fault, "broken tool call")
    inner = call.get("function", call) if isinstance(call, dict) else call
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise fault(
            "broken tool call",
            f'{place} is {shown_value(value)}, expected {{"name": ..., "arguments": {{...}}}}',
        )
    arguments = inner.get("arguments", inner.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    arguments = _parsed(arguments, f"{place}.arguments", fault, "broken tool call")
    if not isinstance(arguments, dict):
        raise fault(
            "broken tool call",
            f"{place}.arguments is {shown_value(arguments)}, expected an object of arguments",
        )
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_tools(value: Any, fault: MakeFault) -> tuple[dict[str, Any], ...]:
    """The schemas of the functions a conversation may call: its cell `tools`."""
    if value is None or value == "":
        return ()
    value = _parsed(value, "column tools", fault, "broken tools")
    tools = value if isinstance(value, list) else [value]
    return tuple(_tool(tool, f"tools[{n}]", fault) for n, tool in enumerate(tools))


def _tool(value: Any, place: str, fault: MakeFault) -> dict[str, Any]:
    tool = _parsed(value, place, fault, "broken tools")
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise fault("broken tools", f"{place} is {shown_value(value)}, expected a schema by name")
    return {"type": "function", "function": inner}


def _parsed(value: Any, place: str, fault: MakeFault, kind: str) -> Any:
    """JSON text as what it says; anything else as it is, if it can be written as JSON."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise fault(kind, f"{place} is {shown_value(value)}: not JSON: {error}") from error
    return value


def shown_value(value: Any) -> str:
    """A short form; `reprlib` also stops at depth, where `repr` of nested JSON overflows."""
    return "null" if value is None else reprlib.repr(value)
