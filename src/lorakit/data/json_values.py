"""Parse JSON, and refuse an object in which a key has two values.

Python's parser keeps the last value of such a key without a word.
"""

from __future__ import annotations

import json
from typing import Any

_SHOWN = 30


class TwoValuesError(ValueError):
    """A key occurs twice in one object, with different values."""

    def __init__(self, key: str, first: Any, second: Any) -> None:
        super().__init__(f"the key {_cut(key)} has two values: {_cut(first)} and {_cut(second)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and _canonical(seen[key]) != _canonical(value):
                raise TwoValuesError(key, seen[key], value)
            seen[key] = value
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
# `json.loads` with a hook would build a decoder for each text.
loads = DECODER.decode


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _cut(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."
