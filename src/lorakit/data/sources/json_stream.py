"""Parse JSON, a list item by item, with errors that name line and column.

A list of rows of any size takes the memory of one row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.data.json_values import DECODER, TwoValuesError, loads
from lorakit.data.sources.files import LONGEST_LINE, pieces_of
from lorakit.data.sources.locate import DataFile
from lorakit.errors import DataError

_SHOWN = 30
_SPACE = re.compile(r"[ \t\n\r]*")
# A piece may end inside an escape (\\u12ab) or a word (-Infinity), but not inside a longer token.
_LOOSE_END = 16
_KEEP_ONE = "keep one of the two, or give the other a name of its own"


def parse(text: str, file: DataFile, line: int, last: bool) -> Any:
    """Parse `text`, which begins on `line` of the file; `last` if it ends with the file.

    Raises:
        DataError: not valid JSON; names file, line and column.
    """
    try:
        return loads(text)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        problem = "the last line is cut off" if last and cut_off else error.msg
        raise _not_json(error, file, line, 0, problem) from error
    except RecursionError:
        raise DataError(f"{file.name}:{line}: nested too deeply to be a row") from None
    except TwoValuesError as error:
        place = "" if "\n" in text.strip() else f":{line}"  # of one line only
        raise DataError(f"{file.name}{place}: {error}", hint=_KEEP_ONE) from error
    except ValueError as error:
        raise DataError(f"{file.name}:{line}: not valid JSON: {error}") from error


def first_sign(file: DataFile) -> str:
    """First character of a file that is not white space; "" for a blank file."""
    # Bytes that are not UTF-8 are reported later, with the other faults of the file.
    pieces = pieces_of(file, errors="replace")
    return next((rest[0] for piece in pieces if (rest := piece.lstrip())), "")


@dataclass
class _Window:
    """The part of a file's text in memory, and the amount of text before it."""

    pieces: Iterator[str]
    text: str = ""
    at: int = 0
    lines: int = 0  # line ends before the text
    column: int = 0  # characters before it on its first line
    ended: bool = False

    def more(self) -> None:
        """Drop the text that was parsed, and read as much again as remains."""
        parsed, rest = self.text[: self.at], self.text[self.at :]
        self.lines += parsed.count("\n")
        self.column = len(parsed) - parsed.rfind("\n") - 1 + (0 if "\n" in parsed else self.column)
        taken = []
        size = max(1, len(rest))
        while size > 0 and not self.ended:
            piece = next(self.pieces, None)
            self.ended = piece is None
            taken.append(piece or "")
            size -= len(piece or "")
        self.text, self.at = "".join([rest, *taken]), 0

    def sign(self) -> str:
        """Peek at the next character that is not white space; "" at the end."""
        while True:
            spaces = _SPACE.match(self.text, self.at)
            self.at = spaces.end() if spaces else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def items_of(file: DataFile) -> Iterator[Any]:
    """Parse the items of the one list in a file.

    Raises:
        DataError: not valid JSON; names the line, the column and the item.
    """
    window, number = _Window(pieces_of(file)), 0
    if window.sign() != "[":
        raise DataError(f"{file.name}: not a list of rows")
    window.at += 1
    if window.sign() != "]":
        while True:
            number += 1
            if number > 1 and window.sign() == "]":
                error = _here(window, file, "Expecting value")
                raise DataError(error.message, hint="remove the comma before ]")
            window.sign()
            yield _item(window, file, number)
            sign = window.sign()
            if sign != ",":
                break
            window.at += 1
        if sign != "]":
            problem = "no comma" if sign else "the list breaks off"
            raise _here(window, file, f"{problem} after item {number}")
    window.at += 1
    if sign := window.sign():
        error = _here(window, file, "Extra data")
        raise DataError(error.message, hint=turn_lists(file, "") if sign == "[" else error.hint)


def turn_lists(file: DataFile, items: str) -> str:
    """Advise on lists of turns without a name; `items` selects them in a jq query."""
    command = file.rewritten_by(f"jq -c '{items}{{messages: .}}'")
    return f"a list of turns has no name: give it one with: {command}"


def _item(window: _Window, file: DataFile, number: int) -> Any:
    while True:
        try:
            value, end = DECODER.raw_decode(window.text, window.at)
            complete = isinstance(value, dict | list | str) or end < len(window.text) - _LOOSE_END
            if complete or window.ended:  # 12 may be the beginning of 12.5
                window.at = end
                return value
            window.more()
        except json.JSONDecodeError as error:
            held = len(window.text) - window.at
            open_end = (
                error.pos > len(window.text) - _LOOSE_END or error.msg.startswith("Unterminated")
            ) and held <= LONGEST_LINE
            if open_end and not window.ended:
                window.more()
                continue
            cut = error.pos >= len(window.text.rstrip()) or error.msg.startswith("Unterminated")
            problem = f"the file ends inside item {number}" if cut and window.ended else error.msg
            raise _not_json(error, file, window.lines + 1, window.column, problem) from error
        except RecursionError:
            raise DataError(
                f"{file.name}: item {number} is nested too deeply to be a row"
            ) from None
        except TwoValuesError as error:
            raise DataError(f"{file.name}: item {number}: {error}", hint=_KEEP_ONE) from error
        except ValueError as error:
            raise DataError(f"{file.name}: item {number}: not valid JSON: {error}") from error


def _here(window: _Window, file: DataFile, problem: str) -> DataError:
    error = json.JSONDecodeError(problem, window.text, window.at)
    return _not_json(error, file, window.lines + 1, window.column, problem)


def _not_json(
    error: json.JSONDecodeError, file: DataFile, line: int, column: int, problem: str
) -> DataError:
    row = line + error.lineno - 1
    row_column = error.colno + (column if error.lineno == 1 else 0)
    near = error.doc[max(0, error.pos - _SHOWN) : error.pos + _SHOWN].strip()
    return DataError(
        f"{file.name}:{row}: column {row_column}: not valid JSON: {problem}, near: {near}",
        hint=_advice(error, problem, file, row),
    )


def _advice(error: json.JSONDecodeError, problem: str, file: DataFile, row: int) -> str:
    """Advise on the most common faults of real files."""
    begin, here = error.doc[:200].lstrip(), error.doc[error.pos : error.pos + 1]
    if begin.startswith("version https://git-lfs"):
        return "this is a git-lfs pointer, not the data: fetch the data with: git lfs pull"
    if re.match(r"<(!doctype|html|\?xml)", begin, re.IGNORECASE):
        return "this is a web page, not data: check for a saved login or error page"
    if problem != error.msg and error.msg != "Extra data":
        return "the file was not written to its end: write it again or remove that line"
    if here == "'" or re.search(r"[{:,\[]\s*'", error.doc[max(0, error.pos - 3) : error.pos + 3]):
        return "single quotes are Python's spelling: write the rows with json.dumps"
    if re.match(r"(None|True|False)\b", error.doc[error.pos :][:6]):
        return "this is Python's spelling (JSON: null, true, false): write with json.dumps"
    if here and here in "\u201c\u201d\u201e\u2018\u2019":
        return "a word processor's quotes: " + file.rewritten_by("sed 's/[“”„]/\"/g'")
    if error.doc.strip() in ("{", "[") or error.doc.strip().rstrip(",") in ("}", "]"):
        return "a row is on one line: " + file.rewritten_by("jq -c .")
    if problem == "Extra data" and error.doc[error.pos :].strip() == ",":
        command = file.rewritten_by("sed 's/, *$//'")
        return f"remove the comma at the end of each line: {command}"
    if here in ("]", "}") and error.doc[: error.pos].rstrip().endswith(","):
        return f"remove the comma before {here}"
    if problem == "Extra data" and "\r" in error.doc.rstrip() and "\n" not in error.doc.rstrip():
        return "its lines end with \\r: " + file.rewritten_by("tr '\\r' '\\n' <")
    if problem == "Extra data":
        command = file.rewritten_by("jq -c .")
        return f"one value a line, or all in one list [..., ...]: {command}"
    return f"show the line with: sed -n {row}p {file.typed}"
