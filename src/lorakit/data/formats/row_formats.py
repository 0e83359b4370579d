"""Recognize the format of rows by their columns, and convert rows to conversations or documents.

To add a format, write one function and one row in FORMATS. The format whose `needs` are all present
in most of the first rows is taken; of equals the first, so the more specific formats come first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data.formats.cells import RowFields, shown_value
from lorakit.data.formats.columns import preference_data
from lorakit.data.formats.messages import (
    history_of,
    is_turn_list,
    parse_messages,
    parse_tools,
    system_of,
    with_system,
)
from lorakit.data.formats.parts import read_parts
from lorakit.data.formats.rendered import is_rendered
from lorakit.data.issues import IssueLog, check_turns
from lorakit.errors import DataError
from lorakit.types import Conversation, Document, Message, Role, Row

GUESS_ROWS = 100
# Columns of data for models with other inputs than text (LLaVA, TRL's vision format).
MEDIA = {"image", "images", "video", "videos", "audio", "audios"}

# Column names seen in data sets, by the part they play: used for suggestions only.
SYNONYMS: dict[str, str] = {
    "instruction": "question query prompt input task request user human source inputs ask "
    "dialogue article",
    "response": "answer output completion reply target label assistant gpt bot chosen targets "
    "result summary highlights translation",
    "messages": "conversation conversations chat dialog dialogue turns",
    "text": "content document body passage article",
}


@dataclass(frozen=True, slots=True)
class FormatGuess:
    """The format of a source, the reason for it, and the renaming of its columns.

    `used` are the columns that the format reads. `confidence` is the share of the first rows that
    fit, divided by the number of formats that fit as well.
    """

    name: str
    reason: str
    columns: Mapping[str, str]
    used: tuple[str, ...] = ()
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A row format: its required and optional columns, and a converter to turns or a text."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    convert: Callable[[RowFields], list[Message] | str]


# -- one function a format ------------------------------------------------------------------------


def _messages(cells: RowFields) -> list[Message]:
    return parse_messages(cells, "messages")


def _sharegpt(cells: RowFields) -> list[Message]:
    return parse_messages(cells, "conversations")


def _pair(question: str, answer: str, context: str = "") -> Callable[[RowFields], list[Message]]:
    """Make a converter for a question and an answer; `context` is appended to the question."""

    def convert(cells: RowFields) -> list[Message]:
        values = cells.values
        if is_turn_list(values.get(question)) or is_turn_list(values.get(answer)):
            return _turn_lists(cells, question, answer)
        prompt = cells.optional(question)
        added = cells.optional(context) if context else ""
        prompt = "\n\n".join(text for text in (prompt, added) if text.strip())
        if not prompt:
            prompt = cells.text(question)
        turns = history_of(cells)
        turns += [Message("user", prompt), Message("assistant", cells.text(answer))]
        return with_system(cells, turns, system_of(cells))

    return convert


def _turn_lists(cells: RowFields, question: str, answer: str) -> list[Message]:
    """Join the turns of two cells; answers inside the prompt are context, as in TRL."""

    def turns_of(part: str, role: Role) -> list[Message]:
        if is_turn_list(cells.values.get(part)):
            return parse_messages(cells, part)
        return [Message(role, cells.text(part))]

    asked, given = turns_of(question, "user"), turns_of(answer, "assistant")
    asked = [replace(turn, train=False) if turn.role == "assistant" else turn for turn in asked]
    return with_system(cells, [*history_of(cells), *asked, *given], system_of(cells))


def _gemini(cells: RowFields) -> list[Message]:
    turns = parse_messages(cells, "contents")
    system = cells.values.get("systemInstruction") or cells.values.get("system_instruction")
    parts = system.get("parts", ()) if isinstance(system, dict) else [system] if system else ()
    text = read_parts(cells, parts, "system", "systemInstruction").text
    return with_system(cells, turns, text)


def _text(cells: RowFields) -> str:
    return cells.text("text")


_CHAT = ("system", "tools", "thinking", "loss_mask")
_OPTIONAL = ("system", "history", "thinking")
_GEMINI = ("systemInstruction", "system_instruction", "tools")
FORMATS: tuple[RowFormat, ...] = (
    RowFormat("messages", ("messages",), _CHAT, _messages),
    RowFormat("sharegpt", ("conversations",), _CHAT, _sharegpt),
    RowFormat("gemini", ("contents",), _GEMINI, _gemini),
    RowFormat(
        "dolly",
        ("instruction", "context", "response"),
        _OPTIONAL,
        _pair("instruction", "response", "context"),
    ),
    RowFormat(
        "instruction/response",
        ("instruction", "response"),
        ("input", *_OPTIONAL),
        _pair("instruction", "response", "input"),
    ),
    RowFormat(
        "alpaca",
        ("instruction", "output"),
        ("input", *_OPTIONAL),
        _pair("instruction", "output", "input"),
    ),
    RowFormat(
        "prompt/completion",
        ("prompt", "completion"),
        ("tools", *_OPTIONAL),
        _pair("prompt", "completion"),
    ),
    RowFormat("prompt/response", ("prompt", "response"), _OPTIONAL, _pair("prompt", "response")),
    RowFormat(
        "question/answer",
        ("question", "answer"),
        ("context", *_OPTIONAL),
        _pair("question", "answer", "context"),
    ),
    RowFormat("query/response", ("query", "response"), _OPTIONAL, _pair("query", "response")),
    RowFormat("input/output", ("input", "output"), _OPTIONAL, _pair("input", "output")),
    RowFormat("text", ("text",), (), _text),
)
_BY_NAME = {f.name: f for f in FORMATS}
PARTS = tuple(dict.fromkeys(part for f in FORMATS for part in (*f.needs, *f.may)))


# -- finding the format ---------------------------------------------------------------------------


def guess_format(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> FormatGuess:
    """Recognize the format of a source from its first rows.

    Args:
        rows: the first rows, up to GUESS_ROWS.
        columns: part -> column name, applied before the formats are compared.

    Raises:
        DataError: no format fits (lists the columns and a `columns:` line to try), a name in
            `columns` is wrong, or the rows are preference pairs.
    """
    columns = dict(columns or {})
    source = rows[0].origin.source
    present = list(dict.fromkeys(str(key) for row in rows for key in row.values))
    check_columns(columns, present, source, PARTS)
    keys_of = [set(renamed(row.values, columns)) for row in rows]
    scores = {
        f.name: sum(set(f.needs) <= keys for keys in keys_of)
        for f in FORMATS
        if set(columns) <= {*f.needs, *f.may}
    }
    name = max(scores, key=lambda n: scores[n], default="")
    name = name if scores.get(name) else ""
    pairs = sum({"chosen", "rejected"} <= keys for keys in keys_of)
    if 2 * pairs > len(rows):
        raise preference_data(rows, source)
    # Messages of people have a column `text` too, which alone would be trained as plain text.
    if not name or (name == "text" and not columns and _known_form(present)):
        raise _no_format(rows, present, columns, source)
    fmt, share = _BY_NAME[name], scores[name]
    rest = f"all of the first {len(rows)} rows"
    if share < len(rows):
        rest = f"{share} of the first {len(rows)} rows"
    needed = ", ".join(columns.get(n, n) for n in fmt.needs)
    rivals = [
        f.name
        for f in FORMATS
        if scores.get(f.name) == share and not set(f.needs) & set(fmt.needs) and f.name != name
    ]
    confidence = share / len(rows) / (1 + len(rivals))
    also = f"; {', '.join(rivals)} would fit too: `columns` decides" if rivals else ""
    columns |= _aliases(rows, fmt, present) if not columns else {}
    used = tuple(columns.get(n, n) for n in (*fmt.needs, *fmt.may))
    reason = f"columns {needed} in {rest}{also}; confidence {confidence:.0%}"
    return FormatGuess(name, reason, columns, used, confidence)


# Other names of optional parts, compared without case.
_ALIASES: dict[str, tuple[str, ...]] = {
    "system": ("system_prompt", "system_message", "systemprompt"),
    "tools": ("functions",),
    "thinking": (
        *("reasoning", "reasoning_content", "thought", "thoughts", "cot", "complex_cot"),
        *("chain_of_thought", "thinking_trajectory", "thought_process", "rationale", "scratchpad"),
    ),
}


def _aliases(rows: Sequence[Row], fmt: RowFormat, present: Sequence[str]) -> dict[str, str]:
    """Find columns that hold an optional part of `fmt` under another name."""
    found: dict[str, str] = {}
    for part, names in _ALIASES.items():
        if part not in fmt.may or part in present:
            continue
        for column in present:
            values = [row.values.get(column) for row in rows]
            # A level of thoughts ("high") or a flag under such a name is no text.
            shortest = 8 if part == "thinking" else 0
            said = any(
                isinstance(v, list) or (isinstance(v, str) and len(v.strip()) > shortest)
                for v in values
            )
            if column.lower() in names and said:
                found.setdefault(part, column)
    return found


def to_conversation(row: Row, guess: FormatGuess, system: str | None) -> Conversation | Document:
    """Convert one row; `system` is used if the row does not have a system text.

    Raises:
        RowError: a column is missing, null, empty or of a wrong type; names row and column.
    """
    cells = RowFields(renamed(row.values, guess.columns), row.origin, guess.columns)
    fmt = _BY_NAME[guess.name]
    _refuse_other_format(cells, fmt)
    refuse_media(cells)
    content = fmt.convert(cells)
    if isinstance(content, str):
        return Document(content, row.origin)
    if system and content[0].role != "system":
        content = [Message("system", system), *content]
    content = _with_thoughts(cells, content)
    tools = parse_tools(cells.values.get("tools"), cells.fault) if "tools" in fmt.may else ()
    return Conversation(tuple(content), row.origin, tools)


def _with_thoughts(cells: RowFields, turns: list[Message]) -> list[Message]:
    """Add the thoughts of a column of their own to the last answer, unless it has some."""
    thoughts = cells.optional("thinking")
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not thoughts.strip() or not answers:
        return turns
    answer = turns[answers[-1]]
    if answer.extra.get("reasoning_content") or "</think>" in answer.content:
        return turns
    turns = list(turns)
    turns[answers[-1]] = replace(answer, extra={**answer.extra, "reasoning_content": thoughts})
    return turns


def _refuse_other_format(cells: RowFields, fmt: RowFormat) -> None:
    """Refuse a row that lacks columns of its format and has all columns of another one."""
    have = set(cells.values)
    if have.issuperset(fmt.needs):
        return
    other = next((f.name for f in FORMATS if have.issuperset(f.needs)), None)
    if other:
        raise cells.fault(
            "row of another format",
            f"this row is of format {other}, the file of format {fmt.name}",
            "put the rows of each format into a separate file; a folder of both can be trained",
        )


def refuse_media(cells: RowFields) -> None:
    """Refuse a row with an image, video or sound: without it the answer is about nothing."""
    for column in MEDIA & cells.values.keys():
        if cells.values[column]:
            raise cells.fault(
                "not text",
                f"column {column} holds {shown_value(cells.values[column])}; only text is trained",
                f"leave the row out, or remove {column} to train on its text alone",
            )


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give the cells of a row the names of their parts."""
    taken = set(columns.values())
    # NaN is pandas' empty cell.
    kept = {
        str(k): None if isinstance(v, float) and v != v else v
        for k, v in values.items()
        if str(k) not in taken
    }
    return kept | {part: values[column] for part, column in columns.items() if column in values}


def check_columns(
    columns: Mapping[str, str], present: Sequence[str], source: str, parts: Sequence[str]
) -> None:
    """Check the recipe's `columns`: part -> column.

    Raises:
        DataError: a part is none of `parts`, or a column is not in the source.
    """
    for part, column in columns.items():
        if part not in parts:
            swapped = f"; did you mean {{{column}: {part}}}?" if column in parts else ""
            raise DataError(
                f"columns: {part!r} is not a part of a row{swapped}",
                hint=f"parts: {', '.join(parts)}",
            )
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            raise DataError(
                f"{source}: columns: there is no column {column!r} for {part} "
                f"(found: {', '.join(present) or 'none'})",
                hint=f"did you mean {{{part}: {near[0]}}}?" if near else None,
            )


def _no_format(
    rows: Sequence[Row], present: Sequence[str], columns: Mapping[str, str], source: str
) -> DataError:
    have = set(renamed(dict.fromkeys(present), columns))
    nearest = max(FORMATS, key=lambda f: len(have.intersection(f.needs)) / len(f.needs))
    if not have.intersection(nearest.needs):
        nearest = _BY_NAME["instruction/response"]
    missing = ", ".join(n for n in nearest.needs if n not in have)
    close = f"; nearest format: {nearest.name}, missing {missing}" if missing else ""
    message = f"{source}: no known format: the columns are {', '.join(present) or '(none)'}{close}"
    if rows[0].origin.row == 2 and any(re.search(r"[?.!]$|^\d+$|.{40}", c) for c in present):
        return DataError(
            message,
            "if the first line is a row already, add a header above it: instruction,response",
        )
    if known := _known_form(present):
        return DataError(message, hint=known)
    if turns := next(
        (c for c, v in rows[0].values.items() if isinstance(v, str) and is_turn_list(v)), ""
    ):
        fix = "" if _works(rows[0], {"messages": turns}) else " after writing it with json.dumps"
        return DataError(
            message,
            hint=f"{turns} is the text of a list of turns: columns: {{messages: {turns}}}{fix}",
        )
    for column, value in rows[0].values.items():
        if isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value):
            if len(present) > 1 and _likeness(column, "response") > 1:
                fix = f"{column} is a list of texts: write the one to learn as a text"
                return DataError(message, hint=fix)
            return DataError(
                message,
                hint=f"{column} is a list of texts without roles: write them in turn as user and "
                'assistant: {"messages": [{"role": "user", "content": "..."}, ...]}',
            )
    rendered = [c for c, v in rows[0].values.items() if isinstance(v, str) and is_rendered(v)]
    if len(rendered) == 1:
        return DataError(
            message, f"{rendered[0]} is a chat written as one text: write its turns as `messages`"
        )
    suggested = next((s for s in _candidates(rows[0]) if _works(rows[0], s)), None)
    if suggested is None:
        return DataError(
            message,
            hint='write each row as {"instruction": "...", "response": "..."} or as '
            '{"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    shown = "{" + ", ".join(f"{part}: {column}" for part, column in suggested.items()) + "}"
    return DataError(
        message,
        hint=f"name the column of each part in the recipe: columns: {shown} "
        f"(or with --set 'columns={shown}')",
    )


def _known_form(present: Sequence[str]) -> str:
    """Return what rows of a well-known form are and what to do with them, or ""."""
    return next((known for keys, known in KNOWN_FORMS if keys <= set(present)), "")


# Columns of well-known forms that are no rows of turns -> what they are, and what to do.
_GATHER = "one turn a row: gather the turns of each conversation in a list under `messages`"
KNOWN_FORMS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"role", "content"}), _GATHER),
    (frozenset({"from", "value"}), _GATHER),
    (frozenset({"sender", "text"}), _GATHER),
    (frozenset({"role", "text"}), _GATHER),
    (frozenset({"parent_id", "text"}), _GATHER),
    (
        frozenset({"input_ids"}),
        "rows that are tokenized already: their ids belong to one tokenizer and template. Give the "
        "texts they were made from",
    ),
    (
        frozenset({"segments"}),
        "segments of axolotl's input_output format: write them as the turns of `messages`, those "
        "with label true as assistant",
    ),
    (
        frozenset({"prompt", "reward_model"}),
        "prompts for reinforcement learning, without answers: add the answer to learn as "
        "`completion`",
    ),
    (
        frozenset({"completions", "labels"}),
        "judged steps for a process reward model: write the right steps as one `completion`",
    ),
    (
        frozenset({"request", "response"}),
        "results of a batch API: write the turns of `request` and the answer of `response` as "
        "`messages`",
    ),
    (
        frozenset({"question", "choices", "answerKey"}),
        "questions with choices: write the choices into the question, and the right one as "
        "`answer`",
    ),
    (
        frozenset({"query", "answers", "tools"}),
        "function calls of xLAM: write query as the user turn and answers as `tool_calls` of the "
        "assistant turn in `messages`, and keep `tools`",
    ),
    (
        frozenset({"mapping", "current_node"}),
        "an export of ChatGPT: its turns are a tree under `mapping`. Follow `parent` from "
        "`current_node`, and write the texts of `content.parts` as `messages`",
    ),
    (
        frozenset({"chat_messages"}),
        "an export of Claude: write `sender` and `text` of `chat_messages` as role and content "
        "of `messages`",
    ),
    (
        frozenset({"annotations", "data"}),
        "an export of Label Studio: write the question of `data` and the answer of `annotations` "
        "as instruction and response",
    ),
    (
        frozenset({"custom_id", "body"}),
        "requests for OpenAI's batch API: they hold no answers. Join them with the results by "
        "custom_id, and write `messages`",
    ),
    (
        frozenset({"preferred_output", "non_preferred_output"}),
        "preference data of OpenAI: write input.messages and preferred_output as one list of "
        "`messages`",
    ),
    (
        frozenset({"columns", "index", "data"}),
        "a table written by pandas with orient='split': write it with "
        "to_json('rows.jsonl', orient='records', lines=True)",
    ),
    (
        frozenset({"system", "chat"}),
        "rows of Glaive: split `chat` at USER: and ASSISTANT: into the turns of `messages`, with "
        "`system` as the first",
    ),
    (
        frozenset({"ts", "text"}),
        "an export of Slack: one message a row. Gather the messages of a thread (`thread_ts`) in a "
        "list under `messages`, with a role for each `user`",
    ),
    (
        frozenset({"context", "question", "answers"}),
        "rows of SQuAD: write the first of answers.text as a column `answer`",
    ),
)
_SPELLED_ALIKE = 0.75
# Columns that are about a row, and are no question or answer.
_ABOUT = re.compile(
    r"(^|_)(id|uuid|date|time|timestamp|url|uri|role|sender|from|model|name|title|source|language|"
    r"lang|created|updated|method|hash|index|node|system)(_|$)|_at$|Id$",
    re.IGNORECASE,
)


def _candidates(row: Row) -> Iterator[dict[str, str]]:
    """Possible `columns:` values for a row, the most likely first."""
    pair = {"source", "target"}  # of a translation
    pair = pair if pair <= row.values.keys() else set()
    values = {str(k): v for k, v in row.values.items() if k in pair or not _ABOUT.search(str(k))}
    yield from ({"messages": c} for c, v in values.items() if isinstance(v, list))
    texts = [c for c, v in values.items() if isinstance(v, str) and v.strip()]
    # A question alone, or a chat written as one text, is not to be trained as plain text.
    asks = [c for c in texts if c.lower() in (*SYNONYMS["instruction"].split(), "instruction")]
    if len(texts) == 1 and not asks and not is_rendered(values[texts[0]]):
        yield {"text": texts[0]}
    if len(texts) > 1:
        answer = max(texts[::-1], key=lambda c: _likeness(c, "response"))
        others = [c for c in texts if c != answer]
        yield {
            "instruction": max(others, key=lambda c: _likeness(c, "instruction")),
            "response": answer,
        }


def _works(row: Row, columns: Mapping[str, str]) -> bool:
    """True if the row can be trained with these columns."""
    try:
        item = to_conversation(row, guess_format([row], columns), None)
        return isinstance(item, Document) or bool(check_turns(item, IssueLog()))
    except DataError:
        return False


def _likeness(column: str, part: str) -> float:
    """Score a name for a part; of names that say nothing, the order of the columns decides."""
    synonyms = [part, *SYNONYMS[part].split()]
    name = column.lower()
    inside = max((len(w) / max(len(name), 1) for w in synonyms if w in name), default=0.0)
    alike = max(difflib.SequenceMatcher(a=name, b=w).ratio() for w in synonyms)
    return 1 + inside if inside else alike if alike > _SPELLED_ALIKE else 0.0
