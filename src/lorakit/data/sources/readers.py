"""Read the rows of a source one by one, each with its origin for messages.

JSON and CSV are read row by row with the standard library. `datasets` would convert date-like
strings to timestamps and the answers "NA" and "None" to nulls, and does not name the line of a
broken file (docs/decisions/001-own-json-and-csv-readers.md has the trials). Parquet, which stores
its types in the file, and hub datasets are read with `datasets`.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.data.json_values import DECODER, loads
from lorakit.data.sources.files import (
    LONGEST_LINE,
    LineErrors,
    lines_of,
    pieces_of,
    read_text,
)
from lorakit.data.sources.http import open_url
from lorakit.data.sources.hub_datasets import read_hub
from lorakit.data.sources.json_stream import first_sign, items_of, parse, turn_lists
from lorakit.data.sources.locate import SUFFIXES, DataFile, HubData, kind_of, locate
from lorakit.errors import DataError, LorakitError, first_line
from lorakit.types import Origin, Row

_SHOWN = 30
# A list under these names is part of one row, not a list of rows.
_INSIDE_ROWS = {"messages", "conversations", "prompt", "completion", "history", "tools"}


def read_rows(source: str, folders: Sequence[Path] = (), *, offline: bool = False) -> Iterator[Row]:
    """Read the rows of `source` in file order, numbered from 1 by line (jsonl, csv) or position.

    Args:
        source: `demo`, a file, folder, glob, address, or hub id `user/name[:config][:split]`.
        folders: folders for relative paths, tried after the current directory.
        offline: refuse sources that need a network.

    Raises:
        DataError: the source is missing, empty, damaged or undecodable; names file, line and
            column. A file is read to its end: one error names all its broken lines, and no row is
            yielded after the first.
    """
    located = locate(source, folders)
    if isinstance(located, HubData):
        yield from read_hub(located, source, offline)
        return
    for file in located:
        if offline and file.remote:
            raise DataError(f"{source}: cannot be fetched offline", hint="download it first")
        with _fetched(file) as local:
            yield from READERS[local.kind](local)


@contextmanager
def _fetched(file: DataFile) -> Iterator[DataFile]:
    """Copy an address to this disk while it is read: readers look at the start of a file first.

    The kind may come from the file name that the server gives: share links have no suffix.
    """
    if not file.remote:
        yield file
        return
    stream, served = open_url(file.path)
    with stream, tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
        name, kind = (file.name, file.kind) if file.kind else (served, kind_of(served))
        if kind is None:
            raise DataError(
                f"{file.path}: unknown kind of file: the server calls it {name or 'nothing'!r}",
                hint=f"share a file that ends in one of {' '.join(SUFFIXES)}, or download it first",
            )
        copy = Path(folder, f"data{kind}")
        try:
            with copy.open("wb") as to:
                shutil.copyfileobj(stream, to)
        except OSError as error:
            raise DataError(
                f"{file.name}: cannot be copied to {folder}: {error.strerror or error}",
                hint="free some space there, or set TMPDIR to a folder of a larger disk",
            ) from error
        yield replace(file, name=name, kind=kind, copy=str(copy))


def content_key(source: str, folders: Sequence[Path] = ()) -> list[Any] | None:
    """Names and hashes of the files of `source`; None if its content is known only when read."""
    located = locate(source, folders)
    if isinstance(located, HubData) or any(file.remote for file in located):
        return None
    entries = []
    for file in located:
        try:
            with open(file.path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error
        entries.append([file.name, file.kind, digest])
    return entries


# -- the kinds of files ---------------------------------------------------------------------------


def _read_json(file: DataFile) -> Iterator[Row]:
    """Read JSON lines, or one JSON array or object, by content: file names are often wrong."""
    sign = first_sign(file)
    if not sign:
        blank = any(pieces_of(file))
        raise DataError(f"{file.name}: {'only blank lines' if blank else 'the file is empty'}")
    if sign == "[":
        yield from _listed(items_of(file), file)
        return
    if sign in "/#":
        raise DataError(
            f"{file.name}: begins with a comment, and JSON has none",
            hint="remove what begins with // or #, to the end of its line",
        )
    if _is_spread(file):
        raise DataError(
            f"{file.name}: rows over several lines each, expected one row a line",
            hint="write each row on one line: " + file.rewritten_by("jq -c ."),
        )
    if file.kind == ".json" and _is_one_object(file):
        yield from _listed(_wrapped(file), file)
        return
    with LineErrors(file.name) as broken:
        for number, line in lines_of(file, broken):
            if line.isspace():
                continue
            try:
                value = loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                broken.add(number, partial(_no_row, line, file, number))
            elif not broken.count:
                yield Row(value, Origin(file.name, number))


def _no_row(line: str, file: DataFile, number: int) -> DataError:
    """Build the error for a line that is not a row."""
    try:
        value = parse(line.rstrip("\r\n"), file, number, last=not line.endswith("\n"))
    except DataError as error:
        return error
    hint = 'write each row as {"instruction": "...", "response": "..."}'
    if isinstance(value, str) and value.lstrip().startswith("{"):
        hint = f"each line is a text that holds JSON: {file.rewritten_by('jq -c fromjson')}"
    if _is_list_of_objects(value):
        hint = turn_lists(file, "")
    return DataError(
        f"{file.name}:{number}: {_type_name(value)} where an object {{...}} is expected: "
        f"{_cut(line.strip())}",
        hint=hint,
    )


def _is_list_of_objects(value: Any) -> bool:
    """True for a list with objects only: rows, or the turns of one conversation."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_spread(file: DataFile) -> bool:
    """True if the file begins with an object over several lines that is not all of it."""
    start = _start(file).lstrip()
    first, _, rest = start.partition("\n")
    if first.rstrip().endswith("}") and rest:  # a row on one line: not parsed twice
        return False
    try:
        _, end = DECODER.raw_decode(start)
    except (ValueError, RecursionError):
        return False
    return "\n" in start[:end] and (file.kind != ".json" or start[end:].lstrip()[:1] == "{")


def _is_one_object(file: DataFile) -> bool:
    """True if the file holds one object, False for one object per line."""
    # Faults of the lines are reported when the file is read.
    lines = (line for _, line in lines_of(file, LineErrors(file.name)) if not line.isspace())
    first, second = next(lines, ""), next(lines, None)
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # A bracket that its line does not close: a pretty-printed file.
        return first.strip() == "{" or (second is not None and first.lstrip()[:1] == "{")
    return second is None


def _wrapped(file: DataFile) -> list[Any]:
    """Rows of a file with one object: the items of its list of rows, or the object itself."""
    value = parse(read_text(file), file, 1, last=False)
    if not isinstance(value, dict):
        raise DataError(f"{file.name}: {_type_name(value)} where a list of rows is expected")
    if any(_is_list_of_objects(value.get(name)) for name in ("messages", "conversations")):
        return [value]  # one conversation, with lists about it
    inner = [
        name
        for name, items in value.items()
        if name not in _INSIDE_ROWS and _is_list_of_objects(items)
    ]
    if len(inner) > 1 and not _INSIDE_ROWS & value.keys():
        longest = max(inner, key=lambda name: len(value[name]))
        query = ".rows[].row" if {"features", "rows"} <= set(inner) else f".{longest}[]"
        raise DataError(
            f"{file.name}: several lists of rows in one file: "
            f"{', '.join(f'{name} ({len(value[name])})' for name in inner[:6])}",
            hint="write the list to train on to a separate file: "
            + file.rewritten_by(f"jq -c '{query}'"),
        )
    _refuse_tables(value, file)
    # A single object with a list of objects is a wrapper: {"data": [...]}.
    rows: list[Any] = value[inner[0]] if len(inner) == 1 else [value]
    return rows


def _refuse_tables(value: dict[str, Any], file: DataFile) -> None:
    """Refuse the forms of pandas' to_json in which a table is one object."""
    if not value or not all(isinstance(inner, dict) and inner for inner in value.values()):
        return
    if all(name.isdigit() for name in value):
        raise DataError(
            f"{file.name}: a table with a number for each row, as pandas' to_json writes it with "
            "orient='index'",
            hint="write the rows alone: " + file.rewritten_by("jq -c '.[]'"),
        )
    if all(name.isdigit() for inner in value.values() for name in inner):
        raise DataError(
            f"{file.name}: a table written column by column, as pandas' to_json does",
            hint="write it with to_json('rows.jsonl', orient='records', lines=True)",
        )


def _listed(items: Iterable[Any], file: DataFile) -> Iterator[Row]:
    position = 0
    with LineErrors(file.name) as broken:
        for position, item in enumerate(items, 1):
            if not isinstance(item, dict):
                broken.add(position, partial(_no_object, item, file, position))
            elif not broken.count:
                yield Row(item, Origin(file.name, position))
    if not position:
        raise DataError(f"{file.name}: an empty list, no rows in it")


def _no_object(item: Any, file: DataFile, position: int) -> DataError:
    fault = f"item {position} is {_type_name(item)}, expected an object {{...}}"
    return DataError(
        f"{file.name}: {fault}",
        hint=turn_lists(file, ".[] | ") if _is_list_of_objects(item) else None,
    )


def _read_csv(file: DataFile) -> Iterator[Row]:
    """Read a table with every cell as text, "NA", "None" and "2021-05-03" too.

    A table that is JSON lines by content is read as that.
    """
    start = _start(file)
    if _is_json(start):
        yield from _read_json(file)
        return
    # The limit of the csv module, 128 KiB a cell, is global to the process; it is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    header: list[str] = []
    begun, rows, width = 1, 0, 0
    reader: Any = None

    with LineErrors(file.name) as broken:
        lines = _table_lines(line for _, line in lines_of(file, broken))
        try:
            options, skipped = _dialect(start)
            all_lines = itertools.islice(lines, skipped, None)
            reader = csv.reader(all_lines, strict=True, **options)
            for cells in reader:
                if not any(cells):
                    pass
                elif not header:
                    width = len(cells)
                    header = _header(cells, file, skipped + begun)
                elif (rows, len(header)) == (0, 1) and _is_title(header, width, cells):
                    raise _title(header[0], cells, file)
                elif len(cells) not in (len(header), width) or any(cells[len(header) :]):
                    line = begun + skipped
                    broken.add(line, partial(_uneven, cells, header, file, line))
                elif not broken.count:
                    rows += 1
                    values = dict(zip(header, cells, strict=False))
                    yield Row(values, Origin(file.name, begun + skipped))
                begun = reader.line_num + 1
        # Reading stops here: the next line may be inside a cell.
        except csv.Error as error:
            raise DataError(
                f"{file.name}:{begun + skipped}: not valid CSV: {error} (the row begins on this "
                f"line, the fault is on line {reader.line_num + skipped})",
                hint='a quote inside a quoted cell is written twice: "say ""hi"""',
            ) from error
    if not rows:
        raise DataError(f"{file.name}: a header ({_cut(', '.join(header))}) and no rows below it")


_DIALECT_LINES = 50
_CR_LINE = re.compile(r"[^\r]*\r\n?|[^\r]+")


def _table_lines(lines: Iterator[str]) -> Iterator[str]:
    """Split lines at the \\r of old Mac programs, if the first line has one inside."""
    first = next(lines, "")
    if "\r" in first.rstrip("\r\n"):
        for line in itertools.chain([first], lines):
            yield from _CR_LINE.findall(line)
        return
    yield from itertools.chain([first], lines)


def _dialect(start: str) -> tuple[dict[str, Any], int]:
    """Options of the csv module for a table, and the number of lines before its header."""
    head = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", start)[:_DIALECT_LINES]
    # Excel's own line names the separator.
    named = re.fullmatch(r"\ufeff?sep=(.)\s*", head[0], re.IGNORECASE) if head else None
    body = head[1:] if named else head
    separator = named.group(1) if named else max(",;\t|", key=(body or [""])[0].count)
    options: dict[str, Any] = {"delimiter": separator}
    try:
        cells = [cell for row in csv.reader(body, delimiter=separator) for cell in row[1:]]
    except csv.Error:
        cells = []
    # A space before a quote would make the quotes part of the text.
    if any(re.match(r' +"', cell) for cell in cells):
        options["skipinitialspace"] = True
    return options, 1 if named else 0


def _is_title(header: Sequence[str], width: int, cells: Sequence[str]) -> bool:
    """True if the first line is a title and the second one names the columns."""
    names = [cell.strip() for cell in cells if cell.strip()]
    plain = len(names) > 1 and all(re.fullmatch(r"[\w .-]{1,30}", name) for name in names)
    return plain and (width > 1 or " " in header[0])


def _title(title: str, cells: Sequence[str], file: DataFile) -> DataError:
    return DataError(
        f"{file.name}:1: a title ({_cut(title)}) above the names of the columns "
        f"({_cut(', '.join(cells))})",
        hint="remove the title: the first line of a table names its columns",
    )


def _start(file: DataFile) -> str:
    """First piece of the text of a file; faults in it are reported when the file is read."""
    return next(pieces_of(file, errors="replace"), "")


def _is_json(start: str) -> bool:
    """True if the first lines of a table or text are JSON objects, or a list of them begins."""
    start = start.lstrip()
    if re.match(r'\[\s*\{\s*"', start):
        return True
    if not start.startswith("{"):
        return False
    try:
        return all(isinstance(json.loads(line), dict) for line in start.split("\n", 2)[:2] if line)
    except (ValueError, RecursionError):
        return False


def _uneven(cells: list[str], header: list[str], file: DataFile, line: int) -> DataError:
    return DataError(
        f"{file.name}:{line}: {len(cells)} cells where the header has {len(header)} "
        f"({', '.join(header[:6])})",
        hint='put cells that hold the separator, a quote or a line end in "quotes"',
    )


def _header(cells: list[str], file: DataFile, line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    while len(names) > 1 and not names[-1]:  # empty columns at the end of a spreadsheet
        names.pop()
    twice = [n for n in names if names.count(n) > 1]
    if twice:  # one column without a name is the row number that pandas writes
        raise DataError(
            f"{file.name}:{line}: the header has the column {twice[0]!r} twice: "
            f"{_cut(', '.join(names))}",
            hint="the first line of a CSV file names its columns",
        )
    return names


# Columns by which a table that was saved as a text is known.
_COLUMNS = {"instruction", "input", "output", "question", "answer", "prompt", "completion"}
_COLUMNS |= {"response", "messages", "conversations"}


def _is_table(start: str) -> bool:
    """True if the first line of a text names two or more columns of rows."""
    first = start.lstrip("\ufeff").partition("\n")[0].strip()
    names = [cell.strip().strip('"') for cell in re.split(r"[,;\t|]", first)]
    return len(_COLUMNS.intersection(names)) > 1 and all(re.fullmatch(r"\w*", n) for n in names)


def _read_text(file: DataFile) -> Iterator[Row]:
    start = _start(file)
    if _is_json(start):  # JSON lines saved as .txt
        yield from _read_json(file)
        return
    if _is_table(start):
        yield from _read_csv(file)
        return
    yield Row({"text": read_text(file)}, Origin(file.name, 1))


def _read_arrow(file: DataFile) -> Iterator[Row]:
    """Read Parquet, or the Arrow files of `save_to_disk`."""
    import datasets

    try:
        # Streaming reads one row group at a time and does not write a copy into the cache.
        path = file.copy or file.path
        # `datasets` also logs the error that it raises, with the complete path.
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
        rows = datasets.load_dataset(file.kind[1:], data_files=path, split="train", streaming=True)
        number = 0
        for number, values in enumerate(rows, 1):
            yield Row(dict(values), Origin(file.name, number))
    except LorakitError:
        raise
    # Every error of the library while it parses (Arrow, OS, value errors) is a fault of the file.
    except Exception as error:
        raise DataError(
            f"{file.name}: not a readable {file.kind[1:].capitalize()} file: "
            f"{first_line(error.__cause__ or error)}"
        ) from error
    if not number:
        raise DataError(f"{file.name}: the file is empty: no rows in it")


READERS: dict[str, Callable[[DataFile], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
    ".txt": _read_text,
    ".md": _read_text,
}


def _type_name(value: Any) -> str:
    """Name the type of a JSON value, with its article."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _cut(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."
