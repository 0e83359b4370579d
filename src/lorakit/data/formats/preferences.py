"""Convert rows of preference data: a chosen and a rejected answer, or an answer with a label.

    prompt, chosen, rejected       texts or lists of turns; the prompt may be part of both lists
    conversations, chosen, rejected    a conversation and its two next turns (ShareGPT)
    chosen, rejected               two conversations with a common beginning, or texts of
                                   Human: and Assistant: turns
    prompt, completion, label      KTO: an answer that is good (true) or bad (false)
    messages, label                the same as a conversation

Answers inside the common beginning are context: they get `train: False`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.data.formats.cells import RowFields, shown_value
from lorakit.data.formats.columns import judging_columns
from lorakit.data.formats.messages import (
    history_of,
    is_turn_list,
    parse_messages,
    parse_tools,
    system_of,
    with_system,
)
from lorakit.data.formats.row_formats import FormatGuess, check_columns, refuse_media, renamed
from lorakit.data.issues import IssueLog
from lorakit.errors import DataError
from lorakit.recipe.schema import PAIR_OBJECTIVES
from lorakit.types import Conversation, Message, Role, Row

# Other names of the parts, compared without case; the first that a row has is taken.
_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "query", "messages", "conversations", "input"),
    "chosen": ("preferred_output", "chosen_response", "response_chosen", "accepted"),
    "rejected": ("non_preferred_output", "rejected_response", "response_rejected"),
    "completion": ("response", "answer", "output", "messages", "conversations"),
    "label": ("kto_tag", "labels"),
    "system": ("system_prompt", "system_message"),
    "context": ("input", "context"),
    "tools": ("functions",),
}
# Parts of other formats under which a recipe may name a column.
_FORMER = {
    **dict.fromkeys(("instruction", "question", "query"), "prompt"),
    **dict.fromkeys(("response", "answer", "output", "messages", "conversations"), "completion"),
    "input": "context",
}
_PAIR = ("chosen", "rejected")
_JUDGED = ("completion", "label")
_OPTIONAL = ("prompt", "context", "system", "tools", "history")
_PARTS = (*_PAIR, *_JUDGED, *_OPTIONAL)
# HH-RLHF writes a conversation as one text.
_SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_TRUE, _FALSE = ("true", "good", "yes", "1"), ("false", "bad", "no", "0")


def guess_preferences(
    rows: Sequence[Row], columns: Mapping[str, str], objective: str
) -> FormatGuess:
    """Find the columns of preference data from the first rows of a source.

    Args:
        columns: part -> column name, as in the recipe.

    Raises:
        DataError: a column that `objective` needs is missing.
    """
    columns = {_FORMER.get(part, part): column for part, column in columns.items()}
    source = rows[0].origin.source
    present = list(dict.fromkeys(str(key) for row in rows for key in row.values))
    check_columns(columns, present, source, _PARTS)
    named = {**_found(present, columns), **columns}
    needs = _PAIR if objective in PAIR_OBJECTIVES or _has(named, _PAIR) else _JUDGED
    missing = [part for part in needs if part not in named]
    if missing:
        raise _missing(source, present, missing, objective)
    taken = {part: named[part] for part in (*needs, *_OPTIONAL) if part in named}
    # A column has one part: `messages` and `input` have several names.
    taken = {p: c for p, c in taken.items() if p in needs or c not in {named[n] for n in needs}}
    if taken.get("context") == taken.get("prompt"):
        taken.pop("context", None)
    if needs == _PAIR and _complete(rows[0].values.get(named["chosen"])):
        taken = {p: c for p, c in taken.items() if p not in ("prompt", "context", "history")}
    both = sum(all(named[part] in row.values for part in needs) for row in rows)
    share = "all of the" if both == len(rows) else f"{both} of the"
    reason = f"columns {', '.join(named[p] for p in needs)} in {share} first {len(rows)} rows"
    scores = judging_columns(present)
    kind = "chosen/rejected" if needs == _PAIR else "answer/label"
    used = tuple(dict.fromkeys([*taken.values(), *scores]))
    return FormatGuess(kind, reason, taken, used, both / len(rows))


def to_preferences(
    row: Row, guess: FormatGuess, system: str | None, objective: str, log: IssueLog
) -> list[Conversation]:
    """Convert one row to a pair, or for KTO to answers with a label.

    Raises:
        RowError: a cell is missing or of a wrong type, the answers are equal, or their prompts
            differ; names row and column.
    """
    values = renamed(row.values, guess.columns)
    # A prompt that is part of both answers is not read again from a column of its own.
    values = {k: v for k, v in values.items() if k not in _PARTS or k in guess.columns}
    cells = RowFields(values, row.origin, guess.columns)
    refuse_media(cells)
    tools = parse_tools(cells.values.get("tools"), cells.fault)

    def conversation(turns: Sequence[Message], more: str | None = system) -> Conversation:
        if more and turns[0].role != "system":
            turns = [Message("system", more), *turns]
        return Conversation(tuple(turns), row.origin, tools)

    if guess.name == "answer/label":
        answer = conversation(_untrained(_prompt(cells), _answer(cells, "completion")))
        return [replace(answer, good=_label(cells))]
    asked = _prompt(cells)
    sides = [[*asked, *_answer(cells, part, bool(asked))] for part in _PAIR]
    chosen, rejected = (with_system(cells, side, system_of(cells)) for side in sides)
    if not asked:
        _refuse_without_prompt(cells, chosen)
    start = _common(cells, chosen, rejected)
    _compare_scores(cells, log)
    chosen, rejected = (_untrained(s[:start], s[start:]) for s in (chosen, rejected))
    pair = conversation(chosen)
    pair = replace(pair, rejected=conversation(rejected).messages)
    return [pair] if objective in PAIR_OBJECTIVES else unpaired(pair)


def unpaired(pair: Conversation) -> list[Conversation]:
    """The two answers of a pair, each with a label."""
    good = replace(pair, rejected=(), good=True)
    return [good, replace(good, messages=pair.rejected, good=False)]


def _found(present: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Find the column of each part that `columns` does not name."""
    lower = {column.lower(): column for column in reversed(present)}
    found = {}
    for part, others in _NAMES.items():
        names = (part, *others) if part != "context" else others
        free = [lower[n] for n in names if n in lower and lower[n] not in columns.values()]
        if part not in columns and free:
            found[part] = free[0]
    if "history" in lower:
        found["history"] = lower["history"]
    return found


def _has(named: Mapping[str, str], parts: Sequence[str]) -> bool:
    return set(parts) <= named.keys()


def _complete(value: Any) -> bool:
    """True for an answer that has its prompt: several turns, or a text of spoken turns."""
    if isinstance(value, str) and not is_turn_list(value):
        return len(_SPOKEN.findall(value)) > 1
    return isinstance(value, list) and len(value) > 1 and is_turn_list(value)


def _prompt(cells: RowFields) -> list[Message]:
    value = cells.values.get("prompt")
    if isinstance(value, dict) and "messages" in value:  # OpenAI's `input`
        cells = replace(cells, values={**cells.values, "prompt": value["messages"]})
        value = value["messages"]
    if value is None:
        return []
    if is_turn_list(value):
        return with_system(cells, parse_messages(cells, "prompt"), system_of(cells))
    texts = (cells.text("prompt"), cells.optional("context"))
    if len(_SPOKEN.findall(texts[0])) and texts[0].lstrip().startswith("Human:"):
        spoken = _spoken(cells, texts[0], "prompt")
        return spoken[:-1] if not spoken[-1].content.strip() else spoken
    asked = Message("user", "\n\n".join(text for text in texts if text.strip()))
    return with_system(cells, [*history_of(cells), asked], system_of(cells))


def _answer(cells: RowFields, part: str, asked: bool = True) -> list[Message]:
    """The turns of an answer: a text, one turn, or a list of turns."""
    value = cells.values.get(part)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        cells = replace(cells, values={**cells.values, part: [value]})
        return parse_messages(cells, part)
    if is_turn_list(value):
        return parse_messages(cells, part)
    text = cells.text(part)
    if not asked:
        return _spoken(cells, text, part)
    role: Role = "assistant"
    return [Message(role, text)]


def _spoken(cells: RowFields, text: str, part: str) -> list[Message]:
    """The turns of a text with Human: and Assistant: at the start of paragraphs."""
    pieces = _SPOKEN.split(text.strip())
    if len(pieces) < 3 or pieces[0].strip():
        raise cells.fault(
            "no prompt",
            f"column {cells.columns.get(part, part)} is a text, and the row has no prompt",
            "add a column prompt, or name it: columns: {prompt: my_question}",
        )
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    names, texts = pieces[1::2], [each.strip() for each in pieces[2::2]]
    for number, (name, said) in enumerate(zip(names, texts, strict=True)):
        if not said and number + 1 < len(names):
            raise cells.fault(f"empty {roles[name]} turn", f"{part}: turn {number + 1} is empty")
    if not texts[-1] and part != "prompt":
        raise cells.fault("empty assistant turn", f"column {part} ends with an empty answer")
    return [Message(roles[n], said) for n, said in zip(names, texts, strict=True)]


def _common(cells: RowFields, chosen: list[Message], rejected: list[Message]) -> int:
    """Number of turns that both begin with: the prompt."""
    if chosen == rejected:
        raise cells.fault(
            "identical answers", "chosen and rejected are equal, so nothing is preferred"
        )
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    start = next((i for i, (a, b) in pairs if a != b), shorter)
    ends = [side[start].role if start < len(side) else "nothing" for side in (chosen, rejected)]
    if start == 0 or ends != ["assistant", "assistant"]:
        raise cells.fault(
            "prompts differ",
            f"chosen and rejected have {start} turn{'s' * (start != 1)} in common, followed by "
            f"{ends[0]} and {ends[1]}, expected an assistant turn in both",
            "both answers must follow the same prompt",
        )
    return start


def _refuse_without_prompt(cells: RowFields, turns: Sequence[Message]) -> None:
    """Refuse conversations that begin with an answer."""
    first = next((t for t in turns if t.role != "system"), None)
    if first is not None and first.role == "assistant":
        raise cells.fault(
            "no prompt",
            "chosen begins with an assistant turn, and the row has no prompt",
            "add a column prompt, or name it: columns: {prompt: my_question}",
        )


def _untrained(prompt: Sequence[Message], answer: Sequence[Message]) -> list[Message]:
    """Join prompt and answer; answers inside the prompt are context."""
    context = [replace(t, train=False) if t.role == "assistant" else t for t in prompt]
    turns = [*context, *answer]
    if not prompt:  # a complete conversation: its last answer is judged
        last = max((i for i, t in enumerate(turns) if t.role == "assistant"), default=-1)
        turns = [
            replace(t, train=False) if t.role == "assistant" and i < last else t
            for i, t in enumerate(turns)
        ]
    return turns


def _label(cells: RowFields) -> bool:
    value = cells.values.get("label")
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in (*_TRUE, *_FALSE):
        return value.strip().lower() in _TRUE
    raise cells.fault(
        "no label",
        f"column {cells.columns.get('label', 'label')} is {shown_value(value)}, expected true "
        "(good) or false (bad)",
    )


def _compare_scores(cells: RowFields, log: IssueLog) -> None:
    """Count pairs whose chosen answer has no higher score than the rejected one."""
    values = {str(key).lower(): value for key, value in cells.values.items()}
    for noun in ("score", "rating"):
        pair = [
            values.get(f"{noun}_{side}", values.get(f"{side}_{noun}", values.get(f"{side}-{noun}")))
            for side in _PAIR
        ]
        a, b = pair
        if isinstance(a, int | float) and isinstance(b, int | float) and a <= b:
            kind = f"chosen answer with a{' lower' if a < b else 'n equal'} {noun}"
            log.add(kind, cells.origin, "kept as written")


def _missing(
    source: str, present: Sequence[str], missing: Sequence[str], objective: str
) -> DataError:
    shape = (
        '{"prompt": "...", "chosen": "...", "rejected": "..."}'
        if objective in PAIR_OBJECTIVES
        else '{"prompt": "...", "completion": "...", "label": true}'
    )
    nouns = f"column{'s' * (len(missing) > 1)} {' and '.join(missing)}"
    return DataError(
        f"{source}: objective: {objective} needs the {nouns} (found: "
        f"{', '.join(present) or 'none'})",
        hint=f"write each row as {shape}, name the columns (columns: {{{missing[0]}: "
        "my_column}), or set objective: sft to imitate one answer",
    )
