"""Convert the cells of one row to turns, tool calls and tool schemas.

Tool calls and schemas may be JSON text or objects, bare or wrapped. A call is converted to
{"type": "function", "function": {"name", "arguments": object}}, a schema to
{"type": "function", "function": {...}}, as chat templates take them. Faults name the row and the
column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.data.formats.cells import RowFields, shown_value
from lorakit.data.formats.marks import is_trained, with_loss_mask
from lorakit.data.formats.parts import read_parts
from lorakit.data.formats.tool_turns import (
    ARGUMENTS,
    merge_calls,
    pair_results,
    unwrapped,
    without_nulls,
)
from lorakit.data.issues import RowError
from lorakit.data.json_values import TwoValuesError, loads
from lorakit.types import Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "ipython": "tool",
}
# Roles whose content is the call itself, as in LLaMA-Factory and ms-swift.
_CALLING = ("function_call", "tool_call", "tool_calls")
# Names that datasets use for `reasoning_content` of the templates.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def parse_messages(cells: RowFields, column: str) -> list[Message]:
    """Parse the turns of a list column with role/content or from/value keys."""
    value = cells.values.get(column)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        # CSV and some Parquet files carry the list as JSON text.
        try:
            value = loads(value)
        except TwoValuesError as error:
            raise cells.fault("broken turns", f"column {column}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise cells.fault(
                "broken turns", f"column {column} is not JSON: {error}", _python_hint(value)
            ) from error
    if isinstance(value, dict):
        value = _as_list(value)
    if not isinstance(value, list):
        state = "missing" if column not in cells.values else shown_value(value)
        raise cells.fault("wrong type", f"column {column} is {state}, expected a list of turns")
    if not value:
        raise cells.fault("no turns", f"column {column} is an empty list")
    turns: list[Message] = []
    for index, turn in enumerate(with_loss_mask(cells, value)):
        turns += _turns(cells, turn, f"{column}[{index}]")
    # Chat exports write "" if no system text was set: such a turn is dropped.
    kept = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    kept = pair_results(cells, merge_calls(kept))
    return with_system(cells, kept, system_of(cells) if column not in _HALVES else "")


# Keys of messages between people.
_SENDERS = {"from_id", "sender", "sender_name", "author", "user", "username", "speaker"}
# Columns with parts of one conversation: a system text is added to all together.
_HALVES = ("prompt", "completion", "history", "chosen", "rejected")


def is_turn_list(value: Any) -> bool:
    """True for a list of turns, or for the JSON (or Python) text of one."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, str) and bool(_TURN_TEXT.match(value))


_TURN_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")


def _python_hint(value: str) -> str | None:
    if "'" not in value:
        return None
    return "single quotes are Python's spelling of a list: write the cell with json.dumps"


def _as_list(value: dict[Any, Any]) -> Any:
    """Convert an object of lists, as `datasets` stores a Sequence of objects, to a list."""
    sizes = {len(v) if isinstance(v, list) else -1 for v in value.values()}
    if len(sizes) != 1 or min(sizes) < 0:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _turns(cells: RowFields, turn: Any, path: str) -> list[Message]:
    """Parse one item of a list of turns; results inside a user turn become turns of their own."""
    if not isinstance(turn, dict):
        raise cells.fault("wrong type", f"{path} is {shown_value(turn)}, expected an object")
    if "input" in turn and "output" in turn and not {"role", "from"} & turn.keys():
        # Capybara: a question and its answer are one item.
        return [
            Message(ROLES[role], cells.as_text(turn[key], f"{path}.{key}"))
            for role, key in (("user", "input"), ("assistant", "output"))
        ]
    name = turn.get("role", turn.get("from"))
    name = name.strip().lower() if isinstance(name, str) else name
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise cells.fault(
            "unknown role", f"{path} has the role {shown_value(name)}; known: {', '.join(ROLES)}",
            "in a chat between people (Telegram, Messenger, Discord) choose whose turns are the "
            "answers: call their role assistant, and that of the others user"
            if turn.keys() & _SENDERS else None,
        )  # fmt: skip
    path = f"{path} ({role})"
    content = next((turn[key] for key in ("content", "value", "parts") if key in turn), None)
    extra = _extra(cells, turn, role, path)
    results: list[Message] = []
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        parts = read_parts(cells, content, role, path)
        content, results = parts.text, parts.results
        if parts.calls:
            extra["tool_calls"] = parse_tool_calls(parts.calls, path, cells.fault)
        if parts.thoughts:
            extra.setdefault("reasoning_content", parts.thoughts)
        if results and not content:
            return results
    if name in _CALLING:
        extra["tool_calls"], content = parse_tool_calls(content, path, cells.fault), ""
    calls = "tool_calls" in extra
    if isinstance(content, float) and content != content:  # NaN: pandas' empty cell
        content = None
    if content is None and role != "system" and not calls:
        raise cells.fault(f"empty {role} turn", f"{path} has no content")
    content = "" if content is None else cells.as_text(content, path)
    # A function may return an empty text, and chat exports write "" if no system text was set.
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise cells.fault(f"empty {role} turn", f"{path} is empty")
    if role == "tool":
        return [Message(role, text, extra) for text in unwrapped(content)]
    return [*results, Message(role, content, extra, is_trained(cells, turn, role, path))]


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


def history_of(cells: RowFields) -> list[Message]:
    """Parse the earlier turns of query/response rows: [[question, answer], ...]."""
    value = cells.values.get("history")
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = _parsed(value, "history", cells.fault, "wrong type")
    if not value:
        return []
    if is_turn_list(value):
        return parse_messages(cells, "history")
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


def system_of(cells: RowFields, column: str = "system") -> str:
    """Text of a system column: a text, or parts as Anthropic and Bedrock write them."""
    value = cells.values.get(column)
    if isinstance(value, list):
        return read_parts(cells, value, "system", f"column {column}").text
    return cells.optional(column)


def with_system(cells: RowFields, turns: list[Message], system: str) -> list[Message]:
    """Prepend a system turn, unless `system` is blank or the turns begin with the same one.

    Raises:
        RowError: the turns begin with another system text.
    """
    if not system.strip():
        return turns
    if not turns or turns[0].role != "system":
        return [Message("system", system), *turns]
    if turns[0].content.strip() != system.strip():
        raise cells.fault(
            "two system texts",
            f"column system has {shown_value(system)}, and the first turn "
            f"{shown_value(turns[0].content)}",
            "keep one of them",
        )
    return turns


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
    arguments: Any = next((inner[k] for k in ARGUMENTS if inner.get(k) is not None), {})
    # JSON text has no nulls but the author's own.
    arguments = (
        (arguments.strip() or {}) if isinstance(arguments, str) else without_nulls(arguments)
    )
    arguments = _parsed(arguments, f"{path}.arguments", fault, "broken tool call")
    if not isinstance(arguments, dict):
        raise fault(
            "broken tool call",
            f"{path}.arguments is {shown_value(arguments)}, expected an object of arguments",
        )
    own = call.get("call_id") or call.get("id")
    call_id = {"id": own} if isinstance(own, str) else {}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_tools(value: Any, fault: MakeFault) -> tuple[dict[str, Any], ...]:
    """Parse the cell `tools`: the schemas of the functions that a conversation may call."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    value = _parsed(value, "column tools", fault, "broken tools")
    tools = value if isinstance(value, list) else [value] if value else []
    # Gemini lists the schemas of a tool one level below.
    tools = [
        schema
        for tool in tools
        for schema in (
            tool["functionDeclarations"]
            if isinstance(tool, dict) and isinstance(tool.get("functionDeclarations"), list)
            else [tool]
        )
    ]
    return tuple(_tool(tool, f"tools[{n}]", fault) for n, tool in enumerate(tools))


def _tool(value: Any, path: str, fault: MakeFault) -> dict[str, Any]:
    tool = _parsed(value, path, fault, "broken tools")
    inner = (tool.get("function") or tool) if isinstance(tool, dict) else None
    if isinstance(inner, dict):
        inner = inner if isinstance(value, str) else without_nulls(inner)
        if "input_schema" in inner:  # Anthropic's name
            inner = {"parameters" if k == "input_schema" else k: v for k, v in inner.items()}
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise fault(
            "broken tools", f"{path} is {shown_value(value)}, expected a schema with a name"
        )
    return {"type": "function", "function": inner}


def _parsed(value: Any, path: str, fault: MakeFault, kind: str) -> Any:
    """Parse JSON text; return other values unchanged if they can be written as JSON."""
    try:
        if isinstance(value, str):
            value = loads(value)
        json.dumps(value, ensure_ascii=False).encode()
    except TwoValuesError as error:
        raise fault(kind, f"{path}: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise fault(kind, f"{path} is {shown_value(value)}: not JSON: {error}") from error
    return value
