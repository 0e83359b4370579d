"""Tool calls and schemas as datasets spell them enter; they leave as chat templates take them.

A call leaves as {"type": "function", "function": {"name", "arguments": object}}, a schema as
{"type": "function", "function": {...}}, whether a row had them as JSON text or as objects, bare or
wrapped.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from typing import Any

from lorakit.data.check import RowFault

# (kind, detail) -> the fault of that row.
Fault = Callable[[str, str], RowFault]


def calls_of(value: Any, place: str, fault: Fault) -> list[dict[str, Any]]:
    """The tool calls of one turn: one or several, as objects or as JSON text."""
    value = _parsed(value, place, fault, "broken tool call")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise fault("broken tool call", f"{place} holds an empty list of tool calls")
    return [_call(call, f"{place}.tool_calls[{n}]", fault) for n, call in enumerate(calls)]


def _call(value: Any, place: str, fault: Fault) -> dict[str, Any]:
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


def tools_of(value: Any, fault: Fault) -> tuple[dict[str, Any], ...]:
    """The schemas of the functions a conversation may call: its cell `tools`."""
    if value is None or value == "":
        return ()
    value = _parsed(value, "column tools", fault, "broken tools")
    tools = value if isinstance(value, list) else [value]
    return tuple(_tool(tool, f"tools[{n}]", fault) for n, tool in enumerate(tools))


def _tool(value: Any, place: str, fault: Fault) -> dict[str, Any]:
    tool = _parsed(value, place, fault, "broken tools")
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise fault("broken tools", f"{place} is {shown_value(value)}, expected a schema by name")
    return {"type": "function", "function": inner}


def _parsed(value: Any, place: str, fault: Fault, kind: str) -> Any:
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
