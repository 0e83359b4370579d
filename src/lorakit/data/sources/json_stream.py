"""JSON text enters; its values leave one by one, or one message that says what stands where.

A list of rows is read item by item, so that a file of any size takes the memory of one row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.data.sources.files import LONGEST_LINE, pieces_of
from lorakit.data.sources.locate import DataFile
from lorakit.errors import DataError

_SHOWN = 30
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
# What breaks off may be an escape (\\u12ab) or a word (-Infinity); a longer rest is a real fault.
_LOOSE_END = 16


def parse(text: str, file: DataFile, line: int, last: bool) -> Any:
    """The value of `text`, which begins on `line`; `last`: it ends where the file does."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        what = "the last line is cut off" if last and cut_off else error.msg
        raise _not_json(error, file, line, 0, what) from error
    except RecursionError:
        raise DataError(f"{file.name}:{line}: nested too deeply to be a row") from None
    except ValueError as error:
        raise DataError(f"{file.name}:{line}: not valid JSON: {error}") from error


def first_sign(file: DataFile) -> str:
    """The first character that is no blank; "" for a file of blanks."""
    # What is not UTF-8 is named where it is read, with the other faults of the file.
    pieces = pieces_of(file, errors="replace")
    return next((rest[0] for piece in pieces if (rest := piece.lstrip())), "")


@dataclass
class _Window:
    """The part of a file's text that is looked at, and how much went before it."""

    pieces: Iterator[str]
    text: str = ""
    at: int = 0
    lines: int = 0  # line ends before the text
    column: int = 0  # characters before it on its first line
    ended: bool = False

    def more(self) -> None:
        """Let go of what was read, and take up as much again as is held."""
        gone, rest = self.text[: self.at], self.text[self.at :]
        self.lines += gone.count("\n")
        self.column = len(gone) - gone.rfind("\n") - 1 + (0 if "\n" in gone else self.column)
        taken = []
        size = max(1, len(rest))
        while size > 0 and not self.ended:
            piece = next(self.pieces, None)
            self.ended = piece is None
            taken.append(piece or "")
            size -= len(piece or "")
        self.text, self.at = "".join([rest, *taken]), 0

    def sign(self) -> str:
        """The next character that is no blank, not yet taken; "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def items_of(file: DataFile) -> Iterator[Any]:
    """The items of the one list that a file holds.

    Raises:
        DataError: no JSON; names the line, the column and the item.
    """
    window, number = _Window(pieces_of(file)), 0
    if window.sign() != "[":
        raise DataError(f"{file.name}: no list of rows")
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
            what = f"the list breaks off after item {number}" if not sign else "no comma"
            raise _here(window, file, what + (f" after item {number}" if sign else ""))
    window.at += 1
    if window.sign():
        raise _here(window, file, "Extra data")


def _item(window: _Window, file: DataFile, number: int) -> Any:
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.at)
            whole = isinstance(value, dict | list | str) or end < len(window.text) - _LOOSE_END
            if whole or window.ended:  # 12 may be the beginning of 12.5
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
            what = f"the file ends inside item {number}" if cut and window.ended else error.msg
            raise _not_json(error, file, window.lines + 1, window.column, what) from error
        except RecursionError:
            raise DataError(
                f"{file.name}: item {number} is nested too deeply to be a row"
            ) from None
        except ValueError as error:
            raise DataError(f"{file.name}: item {number}: not valid JSON: {error}") from error


def _here(window: _Window, file: DataFile, what: str) -> DataError:
    error = json.JSONDecodeError(what, window.text, window.at)
    return _not_json(error, file, window.lines + 1, window.column, what)


def _not_json(
    error: json.JSONDecodeError, file: DataFile, line: int, column: int, what: str
) -> DataError:
    row = line + error.lineno - 1
    place = error.colno + (column if error.lineno == 1 else 0)
    near = error.doc[max(0, error.pos - _SHOWN) : error.pos + _SHOWN].strip()
    return DataError(
        f"{file.name}:{row}: column {place}: not valid JSON: {what}, near: {near}",
        hint=_advice(error, what, file, row),
    )


def _advice(error: json.JSONDecodeError, what: str, file: DataFile, row: int) -> str:
    """What to do about the faults that files of the wild have most often."""
    begin, here = error.doc[:200].lstrip(), error.doc[error.pos : error.pos + 1]
    if begin.startswith("version https://git-lfs"):
        return "this is a pointer of git-lfs, not the data: fetch that with: git lfs pull"
    if re.match(r"<(!doctype|html|\?xml)", begin, re.IGNORECASE):
        return "this is a web page, not data: was it a login or an error that was saved?"
    if what != error.msg and error.msg != "Extra data":
        return "the file was not written to its end; write it anew or remove that line"
    if here == "'" or re.search(r"[{:,\[]\s*'", error.doc[max(0, error.pos - 3) : error.pos + 3]):
        return "single quotes are Python's spelling: write the rows with json.dumps"
    if re.match(r"(None|True|False)\b", error.doc[error.pos :][:6]):
        return "this is Python's spelling (JSON: null, true, false): write with json.dumps"
    if here in ("]", "}") and error.doc[: error.pos].rstrip().endswith(","):
        return f"remove the comma before {here}"
    if what == "Extra data" and "\r" in error.doc.rstrip() and "\n" not in error.doc.rstrip():
        return f"its lines end with \\r: tr '\\r' '\\n' < {file.typed} > lines.jsonl"
    if what == "Extra data":
        return f"one value a line, or all in one list [..., ...]: jq -c . {file.typed} > rows.jsonl"
    return f"see what stands there with: sed -n {row}p {file.typed}"
