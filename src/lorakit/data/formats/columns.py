"""Find the columns that a format does not use, and refuse a column that judges the answers.

A column of labels, votes or scores marks some answers as worse than others. Supervised fine-tuning
learns from all of them alike, so such a column is not ignored silently.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import DataError
from lorakit.types import Row

# Names in DPO and KTO data, reward models, arenas and rating forms; compared word by word.
_JUDGING = frozenset(
    {
        "label",
        "labels",
        "score",
        "scores",
        "rating",
        "ratings",
        "rank",
        "vote",
        "votes",
        "upvotes",
        "downvotes",
        "reward",
        "rewards",
        "preference",
        "preferred",
        "winner",
        "feedback",
        "thumbs",
        "helpfulness",
        "correctness",
        "accepted",
        "approved",
        "correct",
        "good",
        "desirable",
        "liked",
        "weight",
        "weights",
    }
)
_PREFERENCE = frozenset({"chosen", "rejected"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# A judgment is a flag, a number or a short word; longer texts are content.
_LONGEST_JUDGMENT = 40


class ColumnWatch:
    """Collects the columns of one source that its format does not use, row by row.

    Args:
        used: columns that the format reads.
        chosen: `columns` of the recipe. If the user named the columns to train on, all others are
            reported and do not stop the run.
    """

    def __init__(self, used: Sequence[str], chosen: Mapping[str, str] | None) -> None:
        self._used, self._strict = frozenset(used), not chosen
        self._seen: dict[str, None] = {}
        self._first: dict[str, tuple[Any, Row]] = {}
        self._judging: tuple[str, ...] = ()

    @property
    def unused(self) -> list[str]:
        """Unused columns so far, in order of appearance."""
        return [column.strip() or "(no name)" for column in self._seen]

    def check(self, row: Row) -> None:
        """Record the columns of `row`.

        Raises:
            DataError: an unused column judges the answers: it ranks two of them, or it differs
                between rows.
        """
        if not (self._seen.keys() | self._used) >= row.values.keys():
            self._seen |= dict.fromkeys(str(c) for c in row.values if c not in self._used)
            if self._strict:
                self._judging = tuple(c for c in self._seen if _words(c) & (_JUDGING | _PREFERENCE))
        for column in self._judging:
            self._compare(column, row)

    def _compare(self, column: str, row: Row) -> None:
        value = row.values.get(column)
        if _words(column) & _PREFERENCE and value:
            raise preference_data([row], row.origin.source)
        if not _is_judgment(value):
            return
        first, other = self._first.setdefault(column, (value, row))
        if first == value and value is not False:
            return
        raise self._judged(column, other, row, first)

    def _judged(self, column: str, other: Row, row: Row, first: Any) -> DataError:
        value = row.values[column]
        found = f"{row.origin} has {value!r}"
        if other is not row:
            found = f"{other.origin} has {first!r}, {found}"
        used = "{" + ", ".join(f"{c}: {c}" for c in row.values if c in self._used) + "}"
        return DataError(
            f"{row.origin.source}: column {column!r} judges the answers ({found}), and training "
            "would learn from all rows alike",
            hint="keep only the rows that are worth learning from; or name the columns to train "
            f"on, and {column!r} is left out: columns: {used} (or --set 'columns={used}')",
        )


def preference_data(rows: Sequence[Row], source: str) -> DataError:
    """Build the error for rows that rank two answers, with a `columns:` line that fits them."""
    columns = _better_answers(rows)
    hint = (
        f"train on the better answers alone, with columns: {columns}"
        if columns
        else "write the question and the better answer of each row as messages"
    )
    return DataError(
        f"{source}: this is preference data (columns chosen and rejected): it ranks two answers, "
        "while fine-tuning here learns from one",
        hint=hint,
    )


def _better_answers(rows: Sequence[Row]) -> str | None:
    values = rows[0].values
    chosen = values.get("chosen")
    if isinstance(chosen, list) and chosen and "prompt" not in values:
        return "{messages: chosen}"
    texts = [c for c in values if c not in _PREFERENCE and isinstance(values[c], str)]
    usual_names = ["prompt", "instruction", "question", "query", "input"]
    question = next((name for name in usual_names if name in texts), None)
    near = difflib.get_close_matches("prompt", texts, n=1)
    question = question or (near[0] if near else None)
    if isinstance(chosen, str) and question:
        return f"{{instruction: {question}, response: chosen}}"
    if isinstance(chosen, list) and isinstance(values.get("prompt"), str | list):
        # A chat that repeats its prompt is complete; a single answer needs the prompt.
        if len(chosen) > 1:
            return "{messages: chosen}"
        return "{prompt: prompt, completion: chosen}"
    return None


def _words(column: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(str(column))}


def _is_judgment(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value.strip()) <= _LONGEST_JUDGMENT
    return isinstance(value, bool | int | float) and value == value
