"""Cells of one row under their final names, with faults that name row and column."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.issues import RowError
from lorakit.types import Origin

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


def shown_value(value: Any) -> str:
    """Shorten a value for a message; `reprlib` limits depth, where `repr` would overflow."""
    return "null" if value is None else reprlib.repr(value)
