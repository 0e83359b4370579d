"""Find the columns that a format does not use, and refuse those that change what a row means.

A column of labels, votes or scores marks some answers as worse than others. Supervised fine-tuning
learns from all of them alike, so such a column is not ignored silently. Nor is one that assigns
rows to the test split, lists the answers to choose from, marks turns or tokens as not trained, or
sets the chat template of a row.
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
        "kto",
    }
)
# Values that judge an answer under any name, such as `status`.
_VERDICTS = frozenset(
    {
        *("approved", "rejected", "accepted", "declined", "good", "bad", "correct", "incorrect"),
        *("wrong", "passed", "failed", "pass", "fail", "valid", "invalid"),
    }
)
_SPLIT = frozenset({"split", "splits", "partition", "fold"})
_HELD_OUT = re.compile(r"(test|val|eval|dev|hold.?out)", re.IGNORECASE)
_OPTIONS = frozenset({"options", "choices"})
_MASK = frozenset({"mask", "masks", "weights"})
# Variables of the template for one row, as TRL reads them.
_TEMPLATE = frozenset({"chat_template_kwargs", "template_kwargs", "enable_thinking"})
_PREFERENCE = frozenset({"chosen", "rejected"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# A judgment is a flag, a number or a short word; longer texts are content.
_LONGEST_JUDGMENT = 40


class ColumnWatch:
    """Collects the columns of one source that its format does not use, row by row.

    Args:
        used: columns that the format reads.
        parts: part -> column, where the names differ.
        chosen: `columns` of the recipe. If the user named the columns to train on, all others are
            reported and do not stop the run.
    """

    def __init__(
        self, used: Sequence[str], parts: Mapping[str, str], chosen: Mapping[str, str] | None
    ) -> None:
        self._used, self._strict = frozenset(used), not chosen
        self._part = {column: part for part, column in parts.items()}
        self._seen: dict[str, None] = {}
        self._first: dict[str, tuple[Any, Row]] = {}
        self._meaning: dict[str, frozenset[str]] = {}

    @property
    def unused(self) -> list[str]:
        """Unused columns so far, in order of appearance."""
        return [column.strip() or "(no name)" for column in self._seen]

    def check(self, row: Row) -> None:
        """Record the columns of `row`.

        Raises:
            DataError: an unused column judges the answers (it ranks two of them, or it differs
                between rows), holds this row out, or has options, a mask or variables of the
                template that would be lost.
        """
        if not (self._seen.keys() | self._used) >= row.values.keys():
            self._seen |= dict.fromkeys(str(c) for c in row.values if c not in self._used)
            if self._strict:
                self._meaning = {column: frozenset(_words(column)) for column in self._seen}
        for column, words in self._meaning.items():
            value = row.values.get(column)
            verdict = isinstance(value, str) and value.strip().lower() in _VERDICTS
            if verdict or words & (_JUDGING | _PREFERENCE):
                self._compare(column, row)
            if words & _SPLIT and isinstance(value, str) and _HELD_OUT.match(value.strip()):
                raise self._lost(
                    column, row, f"says {value!r}, and the row would be trained",
                    "write the rows of each split to a file of its own, and name the others in "
                    "val_data",
                )  # fmt: skip
            if words & _OPTIONS and not self._shown(value, row):
                raise self._lost(
                    column, row, "lists answers to choose from that the question does not show",
                    "write the options into the question",
                )  # fmt: skip
            if column.lower() in _TEMPLATE and value is not None:
                problem = f"sets the chat template of this row ({value!r}), and is not read"
                raise DataError(
                    f"{row.origin}: column {column!r} {problem}",
                    f"{self._without(column, row)}; template_kwargs in the recipe sets the "
                    "template of all rows",
                )
            if words & _MASK and isinstance(value, list) and _flags(value):
                raise self._lost(
                    column, row, "marks turns or tokens, and is not read",
                    "mark the turns themselves: train: false",
                )  # fmt: skip

    def _shown(self, value: Any, row: Row) -> bool:
        """True if the texts of `value` are in the columns that are read."""
        inner = value.values() if isinstance(value, Mapping) else value
        texts = [inner] if isinstance(inner, str) else list(inner or ())
        texts = [t for item in texts for t in (item if isinstance(item, list) else [item])]
        read = " ".join(str(row.values.get(column)) for column in self._used)
        return all(str(text) in read for text in texts)

    def _lost(self, column: str, row: Row, problem: str, hint: str) -> DataError:
        return DataError(
            f"{row.origin}: column {column!r} {problem}",
            f"{hint}; or {self._without(column, row)}",
        )

    def _without(self, column: str, row: Row) -> str:
        read = [f"{self._part.get(c, c)}: {c}" for c in row.values if c in self._used]
        used = "{" + ", ".join(read) + "}"
        return (
            f"name the columns to train on, and {column!r} is left out: columns: {used} "
            f"(or --set 'columns={used}')"
        )

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
        return DataError(
            f"{row.origin.source}: column {column!r} judges the answers ({found}), and training "
            "would learn from all rows alike",
            hint="keep only the rows that are worth learning from; or "
            + self._without(column, row),
        )


def judging_columns(present: Sequence[str]) -> list[str]:
    """Columns whose name says that they judge answers, such as scores."""
    return [column for column in present if _words(column) & (_JUDGING | _PREFERENCE)]


def preference_data(rows: Sequence[Row], source: str) -> DataError:
    """Build the error for rows that rank two answers, with a `columns:` line that fits them."""
    columns = _better_answers(rows)
    hint = "set objective: dpo to learn the preference; or " + (
        f"train on the better answers alone, with columns: {columns}"
        if columns
        else "write the question and the better answer of each row as messages"
    )
    return DataError(
        f"{source}: this is preference data (columns chosen and rejected): it ranks two answers, "
        "while objective: sft learns from one",
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


def _flags(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, bool | int | float) for value in values)


def _is_judgment(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value.strip()) <= _LONGEST_JUDGMENT
    return isinstance(value, bool | int | float) and value == value
