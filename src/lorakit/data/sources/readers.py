"""A source string enters; its rows leave one by one, each with its place for later messages.

JSON and CSV are read row by row with the standard library. `datasets` would turn date-like
strings into timestamps and the answers "NA" and "None" into nulls, and names no line of a broken
file (docs/log.md has the trials). Parquet, whose types are written in the file, and hub datasets
go through `datasets`.
"""

from __future__ import annotations

import atexit
import csv
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.data.sources.files import (
    LONGEST_LINE,
    LineErrors,
    lines_of,
    open_file,
    pieces_of,
    read_text,
)
from lorakit.data.sources.http import open_url
from lorakit.data.sources.hub_datasets import read_hub
from lorakit.data.sources.json_stream import first_sign, items_of, parse
from lorakit.data.sources.locate import SUFFIXES, DataFile, HubData, kind_of, locate
from lorakit.errors import DataError, LorakitError, first_line
from lorakit.types import Origin, Row

_SHOWN = 30
# A list under these names is part of one row, not a list of rows.
_INSIDE_ROWS = {"messages", "conversations", "prompt", "completion", "history", "tools"}


def read_rows(source: str, folders: Sequence[Path] = (), *, offline: bool = False) -> Iterator[Row]:
    """Rows of `source` in file order. Rows count from 1: by line (jsonl, csv), else by position.

    Args:
        source: `demo`, a file, folder, glob, address, or hub id `user/name[:config][:split]`.
        folders: where relative paths are tried after the current directory.
        offline: refuse what needs a network.

    Raises:
        DataError: missing, empty, damaged or undecodable; names file, line and column. A file is
            read to its end first: one error names all its broken lines, and no row follows them.
    """
    located = locate(source, folders)
    if isinstance(located, HubData):
        yield from read_hub(located, source, offline)
        return
    for file in located:
        if offline and file.remote:
            raise DataError(f"{source}: cannot be fetched offline", hint="download it first")
        known = file if file.kind else _asked_for_kind(file)
        yield from READERS[known.kind](known)


def _asked_for_kind(file: DataFile) -> DataFile:
    """`file` with the kind that the server's name for it tells: share links tell none."""
    stream, name = open_url(file.path)
    stream.close()
    kind = kind_of(name)
    if kind is None:
        raise DataError(
            f"{file.path}: what kind of file is this? The server calls it {name or 'nothing'!r}",
            hint=f"it must end in one of {' '.join(SUFFIXES)}; or download it first",
        )
    return replace(file, name=name, kind=kind)


def content_key(source: str, folders: Sequence[Path] = ()) -> list[Any] | None:
    """Names and hashes of the files of `source`; None where its content is known only when read."""
    located = locate(source, folders)
    if isinstance(located, HubData) or any(file.remote for file in located):
        return None
    found = []
    for file in located:
        try:
            with open(file.path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error
        found.append([file.name, file.kind, digest])
    return found


# -- the kinds of files ---------------------------------------------------------------------------


def _read_json(file: DataFile) -> Iterator[Row]:
    """JSON lines, or one JSON array or object, told apart by content: names are often wrong."""
    sign = first_sign(file)
    if not sign:
        blank = any(pieces_of(file))
        raise DataError(f"{file.name}: {'only blank lines' if blank else 'the file is empty'}")
    if sign == "[":
        yield from _listed(items_of(file), file)
        return
    if file.kind == ".json" and _is_one_object(file):
        yield from _listed(_wrapped(file), file)
        return
    with LineErrors(file.name) as broken:
        for number, line in lines_of(file, broken):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                broken.add(number, partial(_no_row, line, file, number))
            elif not broken.count:
                yield Row(value, Origin(file.name, number))


def _no_row(line: str, file: DataFile, number: int) -> DataError:
    """What is wrong with a line that is no row."""
    try:
        value = parse(line.rstrip("\r\n"), file, number, last=not line.endswith("\n"))
    except DataError as error:
        return error
    return DataError(
        f"{file.name}:{number}: {_a(value)} where an object {{...}} is expected: "
        f"{_cut(line.strip())}",
        hint='write each row as {"instruction": "...", "response": "..."}',
    )


def _is_one_object(file: DataFile) -> bool:
    """Not one object a line."""
    # Faults are named by who reads the file.
    lines = (line for _, line in lines_of(file, LineErrors(file.name)) if not line.isspace())
    first, second = next(lines, ""), next(lines, None)
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # An opened bracket that the line does not close: a pretty-printed file.
        return first.strip() == "{" or (second is not None and first.lstrip()[:1] == "{")
    return second is None


def _wrapped(file: DataFile) -> list[Any]:
    """The rows of a file that holds one object: those of its list of rows, or itself."""
    value = parse(read_text(file), file, 1, last=False)
    if not isinstance(value, dict):
        raise DataError(f"{file.name}: {_a(value)} where a list of rows is expected")
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v}
    inner = [
        k
        for k, v in lists.items()
        if k not in _INSIDE_ROWS and all(isinstance(item, dict) for item in v)
    ]
    if len(inner) > 1 and len(inner) == len(value):
        raise DataError(
            f"{file.name}: several lists of rows in one file: {', '.join(inner[:6])}",
            hint="give each list a file of its own",
        )
    # A lone object with a list of objects is a wrapper: {"data": [...]}.
    found: list[Any] = value[inner[0]] if inner else [value]
    return found


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
    what = f"item {position} is {_a(item)}, expected an object {{...}}"
    return DataError(f"{file.name}: {what}")


def _read_csv(file: DataFile) -> Iterator[Row]:
    """Every cell stays the text it is: "NA", "None" and "2021-05-03" too."""
    # The csv module's own limit, 128 KiB a cell, is for the whole process; only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    header: list[str] = []
    begun, rows = 1, 0
    reader: Any = None

    with LineErrors(file.name) as broken:
        lines = (line for _, line in lines_of(file, broken))
        try:
            first = next(lines)
            reader = csv.reader(_chain(first, lines), delimiter=_delimiter(first), strict=True)
            for cells in reader:
                if not cells:
                    pass
                elif not header:
                    header = _header(cells, file)
                elif len(cells) != len(header):
                    broken.add(begun, partial(_uneven, cells, header, file, begun))
                elif not broken.count:
                    rows += 1
                    yield Row(dict(zip(header, cells, strict=True)), Origin(file.name, begun))
                begun = reader.line_num + 1
        # Not read on: the next line may be the inside of a cell.
        except csv.Error as error:
            raise DataError(
                f"{file.name}:{begun}: not valid CSV: {error} (the row begins on this line, "
                f"the trouble is on line {reader.line_num})",
                hint='a quote inside a quoted cell is written twice: "say ""hi"""',
            ) from error
    if not rows:
        raise DataError(f"{file.name}: a header ({_cut(', '.join(header))}) and no rows below it")


def _uneven(cells: list[str], header: list[str], file: DataFile, line: int) -> DataError:
    return DataError(
        f"{file.name}:{line}: {len(cells)} cells where the header has {len(header)} "
        f"({', '.join(header[:6])})",
        hint='put cells that hold the separator, a quote or a line end in "quotes"',
    )


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _header(cells: list[str], file: DataFile) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [n for n in names if names.count(n) > 1]
    if twice:  # one column without a name is the row number that pandas writes
        raise DataError(
            f"{file.name}:1: the header has the column {twice[0]!r} twice: "
            f"{_cut(', '.join(names))}",
            hint="the first line of a CSV file names its columns",
        )
    return names


def _read_text(file: DataFile) -> Iterator[Row]:
    yield Row({"text": read_text(file)}, Origin(file.name, 1))


def _read_parquet(file: DataFile) -> Iterator[Row]:
    import datasets

    try:
        # Streaming reads row group by row group and writes no copy into the cache.
        path = _local_copy(file) if file.remote else file.path
        # It also logs what it raises, with the whole path.
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
        rows = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        number = 0
        for number, values in enumerate(rows, 1):
            yield Row(dict(values), Origin(file.name, number))
    except LorakitError:
        raise
    # Whatever the library meets in the bytes (Arrow, OS, value errors) is a fault of the file.
    except Exception as error:
        raise DataError(
            f"{file.name}: not a readable Parquet file: {first_line(error.__cause__ or error)}"
        ) from error
    if not number:
        raise DataError(f"{file.name}: the file is empty: no rows in it")


def _local_copy(file: DataFile) -> str:
    """A Parquet file from afar on this disk, as long as the process lasts: its index is last."""
    with (
        open_file(file) as stream,
        tempfile.NamedTemporaryFile(suffix=".parquet", delete=False) as to,
    ):
        atexit.register(Path(to.name).unlink, missing_ok=True)
        shutil.copyfileobj(stream, to)
        return to.name


READERS: dict[str, Callable[[DataFile], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}


def _a(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _cut(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."
