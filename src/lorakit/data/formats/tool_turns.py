"""Bring tool turns into one form: calls in one turn, results in the order of their calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorakit.data.formats.cells import RowFields
from lorakit.types import Message

ARGUMENTS = ("arguments", "parameters", "args", "input")
_WRAPPED = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)


def unwrapped(content: str) -> list[str]:
    """Results without the <tool_response> marks that chat templates write themselves."""
    results, at = [], 0
    while match := _WRAPPED.match(content, at):
        results.append(match.group(1).strip("\n"))
        at = match.end()
    return results if results and at == len(content) else [content]


def merge_calls(turns: Sequence[Message]) -> list[Message]:
    """Merge call turns in a row, as ms-swift writes parallel calls, into one turn."""
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.extra.get("tool_calls")
            and turn.extra.get("tool_calls")
            and last.role == turn.role == "assistant"
            and not turn.content
            and last.train == turn.train
        ):
            calls = [*last.extra["tool_calls"], *turn.extra["tool_calls"]]
            merged[-1] = replace(last, extra={**last.extra, "tool_calls": calls})
        else:
            merged.append(turn)
    return merged


def pair_results(cells: RowFields, turns: Sequence[Message]) -> list[Message]:
    """Order the results of parallel calls by their ids, since templates write no ids.

    Raises:
        RowError: a result has the id of no call, or a call has no result although the
            conversation goes on.
    """
    paired, at = list(turns), 0
    while at < len(paired):
        calls = paired[at].extra.get("tool_calls") or ()
        at += 1
        begin = at
        while at < len(paired) and paired[at].role == "tool":
            at += 1
        results = paired[begin:at]
        ids = [call.get("id") for call in calls]
        named = [result.extra.get("tool_call_id") for result in results]
        if not results or None in ids or None in named or len(set(ids)) < len(ids):
            continue
        unknown = [name for name in named if name not in ids]
        if unknown:
            raise cells.fault(
                "tool result without call",
                f"turn {begin + 1 + named.index(unknown[0])} is the result of {unknown[0]!r}, "
                f"expected one of {', '.join(map(repr, ids))}",
            )
        missing = [name for name in ids if name not in named]
        if missing and at < len(paired):
            raise cells.fault(
                "tool call without result",
                f"the call {missing[0]!r} in turn {begin} has no result",
                "add the result of each call, or remove the call",
            )
        paired[begin:at] = sorted(results, key=lambda r: ids.index(r.extra["tool_call_id"]))
    return paired


def without_nulls(value: Any) -> Any:
    """Remove keys that are null: Arrow gives every object of a column the keys of all others.

    Nulls in lists (an enum) stay, and JSON text is not touched.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def has_null_arguments(values: Any) -> bool:
    """True if a call in a row has an argument that is null, which `without_nulls` removes."""
    if isinstance(values, list):
        return any(map(has_null_arguments, values))
    if not isinstance(values, dict):
        return False
    for key, inner in values.items():
        if key in ARGUMENTS and isinstance(inner, dict) and without_nulls(inner) != inner:
            return True
        if key not in ("tools", "functions") and has_null_arguments(inner):
            return True
    return False
