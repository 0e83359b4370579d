"""Read the function calls of an answer, in the forms in which chat models write them.

JSON objects with a name and arguments (alone, in a list, or in tags), and Python calls in brackets:
`[weather(city="Oslo")]`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from lorakit.types import Message

Call = dict[str, Any]
_ARGUMENTS = ("arguments", "parameters")


def expected_calls(turn: Message) -> list[Call]:
    """Calls of a reference turn, with parsed arguments."""
    found = []
    for call in turn.extra.get("tool_calls", ()):
        function = call.get("function", call)
        found.append({"name": function["name"], "arguments": _parsed(function.get("arguments"))})
    return found


def called_in(answer: str) -> list[Call]:
    """Calls that an answer makes, in order."""
    found = [call for value in _json_values(answer) for call in _calls_of(value)]
    return found or _python_calls(answer)


def _json_values(text: str) -> Iterator[Any]:
    """The outermost JSON objects and lists in a text."""
    decoder, place = json.JSONDecoder(), 0
    while (starts := [i for i in (text.find(c, place) for c in "{[") if i >= 0]) and starts:
        place = min(starts)
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
        else:
            yield value


def _calls_of(value: Any) -> list[Call]:
    if isinstance(value, list):
        return [call for each in value for call in _calls_of(each)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("function"), dict):
        return _calls_of(value["function"])
    given = next((value[key] for key in _ARGUMENTS if key in value), None)
    if not isinstance(value.get("name"), str) or given is None:
        return []
    return [{"name": value["name"], "arguments": _parsed(given)}]


def _python_calls(answer: str) -> list[Call]:
    text = answer.strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    found = []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args:
            return []
        try:
            given = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except ValueError:
            return []
        found.append({"name": ast.unparse(node.func), "arguments": given})
    return found


def _parsed(arguments: Any) -> Any:
    """Arguments as values; they may be a JSON text."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
