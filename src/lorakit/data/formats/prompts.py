"""Convert rows to prompts with the columns that reward functions read.

A prompt is a question (`prompt`, `question`, `query`, `problem`, `instruction`, `input`) or turns
that end with a user turn. The item is a conversation whose last turn is the reference answer, with
all columns of the row in its `extra`; a row without an answer has an empty last turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.data.formats.cells import RowFields, shown_value
from lorakit.data.formats.columns import preference_data
from lorakit.data.formats.messages import (
    is_turn_list,
    parse_messages,
    parse_tools,
    system_of,
    with_system,
)
from lorakit.data.formats.row_formats import FormatGuess, check_columns, renamed
from lorakit.data.issues import RowError
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import Conversation, Message, Row

# Names of the prompt and of the reference, the more specific ones first.
QUESTIONS = ("messages", "conversations", "prompt", "question", "query", "problem", "instruction",
             "input")  # fmt: skip
ANSWERS = ("answer", "solution", "ground_truth", "final_answer", "reference", "response", "output",
           "completion", "target")  # fmt: skip
PARTS = ("prompt", "answer", "system", "tools")
# Key of the last turn's `extra` with the columns of the row.
FIELDS = "columns"
# Names that lorakit gives to reward functions itself.
RESERVED = ("prompts", "completions", "completion_ids")


def guess_prompts(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> FormatGuess:
    """Find the columns with the prompt and the reference in the first rows of a source.

    Args:
        columns: part -> column, as in the recipe.

    Raises:
        DataError: no column holds a prompt, a name in `columns` is wrong, or the rows are
            preference pairs.
    """
    columns, source = dict(columns or {}), rows[0].origin.source
    present = list(dict.fromkeys(str(key) for row in rows for key in row.values))
    check_columns(columns, present, source, PARTS)
    if {"chosen", "rejected"} <= set(present):
        raise preference_data(rows, source)
    for part, names in (("prompt", QUESTIONS), ("answer", ANSWERS)):
        found = next((name for name in names if name in present and _used(rows, name)), None)
        if part not in columns and found is not None:
            columns[part] = found
    if "prompt" not in columns:
        raise DataError(
            f"{source}: no column holds a prompt (columns: {', '.join(present)})",
            hint=f"name it: columns: {{prompt: {present[0] if present else 'my_column'}}}; known "
            f"names are {', '.join(QUESTIONS)}",
        )
    if columns.get("answer") == columns["prompt"]:
        del columns["answer"]
    given = f"reference {columns['answer']}" if "answer" in columns else "no reference"
    reason = f"prompt {columns['prompt']}, {given}; all columns go to the reward functions"
    return FormatGuess("prompts", reason, columns, tuple(present))


def _used(rows: Sequence[Row], name: str) -> bool:
    return any(row.values.get(name) not in (None, "") for row in rows)


def to_prompt(row: Row, guess: FormatGuess, system: str | None) -> Conversation:
    """Convert one row; `system` is used if the row does not have a system text.

    Raises:
        RowError: the prompt is missing, empty, or does not end with a user turn.
    """
    cells = RowFields(renamed(row.values, guess.columns), row.origin, guess.columns)
    turns, answer = _turns(cells), _text_of(cells.values.get("answer"))
    if turns[-1].role == "assistant":
        answer = answer or turns[-1].content
        turns = turns[:-1]
    if not turns or turns[-1].role not in ("user", "tool"):
        last = turns[-1].role if turns else "nothing"
        raise cells.fault(
            "prompt without question", f"the prompt ends with {last}, expected a user turn"
        )
    if system and turns[0].role != "system":
        turns = [Message("system", system), *turns]
    fields = {str(key): _plain(value) for key, value in row.values.items() if key not in RESERVED}
    if "answer" in guess.columns:
        fields["answer"] = _plain(cells.values.get("answer"))
    elif answer:
        fields["answer"] = answer
    tools = parse_tools(cells.values.get("tools"), cells.fault)
    reference = Message("assistant", answer, {FIELDS: fields})
    return Conversation((*turns, reference), row.origin, tools)


def _turns(cells: RowFields) -> list[Message]:
    if is_turn_list(cells.values.get("prompt")):
        return with_system(cells, parse_messages(cells, "prompt"), system_of(cells))
    question, more = cells.text("prompt"), ""
    if cells.columns.get("prompt") == "instruction":  # Alpaca's second half of the question
        more = cells.optional("input")
    text = "\n\n".join(part for part in (question, more) if part.strip())
    return with_system(cells, [Message("user", text)], system_of(cells))


def _text_of(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: dates and bytes become texts."""
    return json.loads(json.dumps(value, default=str))


def check_references(item: Conversation, recipe: Recipe) -> Conversation:
    """Check that a row has the columns that the recipe's rewards need.

    Raises:
        RowError: one is missing or empty.
    """
    fields = item.messages[-1].extra[FIELDS]
    for entry in recipe.rewards:
        column = entry.reference_column
        value = fields.get(column) if column else True
        if value is None or value == "" or value == []:
            state = "is missing" if column not in fields else f"is {shown_value(value)}"
            raise RowError(
                f"no {column}",
                item.origin,
                f"column {column} {state}, and reward {entry.shown} reads it",
                f"name it: columns: {{{column}: ...}}" if column == "answer" else None,
            )
    return item
