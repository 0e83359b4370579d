"""Read the rows of a source one by one, each with its origin for messages.

JSON and CSV are read row by row with the standard library. `datasets` would convert date-like
strings to timestamps and the answers "NA" and "None" to nulls, and does not name the line of a
broken file (docs/decisions/001-own-json-and-csv-readers.md has the trials). Parquet, which stores
its types in the file, and hub datasets are read with `datasets`.
"""

from __future__ import annotations

import atexit
import csv
import hashlib
import itertools
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
        typed = file if file.kind else _with_server_kind(file)
        yield from READERS[typed.kind](typed)


def _with_server_kind(file: DataFile) -> DataFile:
    """Take the kind from the file name that the server gives: share links have no suffix."""
    stream, name = open_url(file.path)
    stream.close()
    kind = kind_of(name)
    if kind is None:
        raise DataError(
            f"{file.path}: unknown kind of file: the server calls it {name or 'nothing'!r}",
            hint=f"share a file that ends in one of {' '.join(SUFFIXES)}, or download it first",
        )
    return replace(file, name=name, kind=kind)


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
    """Build the error for a line that is not a row."""
    try:
        value = parse(line.rstrip("\r\n"), file, number, last=not line.endswith("\n"))
    except DataError as error:
        return error
    return DataError(
        f"{file.name}:{number}: {_type_name(value)} where an object {{...}} is expected: "
        f"{_cut(line.strip())}",
        hint='write each row as {"instruction": "...", "response": "..."}',
    )


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
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v}
    inner = [
        k
        for k, v in lists.items()
        if k not in _INSIDE_ROWS and all(isinstance(item, dict) for item in v)
    ]
    if len(inner) > 1 and len(inner) == len(value):
        raise DataError(
            f"{file.name}: several lists of rows in one file: {', '.join(inner[:6])}",
            hint="write each list to a separate file",
        )
    # A single object with a list of objects is a wrapper: {"data": [...]}.
    rows: list[Any] = value[inner[0]] if inner else [value]
    return rows


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
    return DataError(f"{file.name}: {fault}")


def _read_csv(file: DataFile) -> Iterator[Row]:
    """Read CSV with every cell as text, "NA", "None" and "2021-05-03" too."""
    # The limit of the csv module, 128 KiB a cell, is global to the process; it is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    header: list[str] = []
    begun, rows = 1, 0
    reader: Any = None

    with LineErrors(file.name) as broken:
        lines = (line for _, line in lines_of(file, broken))
        try:
            first = next(lines)
            all_lines = itertools.chain([first], lines)
            reader = csv.reader(all_lines, delimiter=_delimiter(first), strict=True)
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
        # Reading stops here: the next line may be inside a cell.
        except csv.Error as error:
            raise DataError(
                f"{file.name}:{begun}: not valid CSV: {error} (the row begins on this line, "
                f"the fault is on line {reader.line_num})",
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
        # Streaming reads one row group at a time and does not write a copy into the cache.
        path = _local_copy(file) if file.remote else file.path
        # `datasets` also logs the error that it raises, with the complete path.
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
        rows = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        number = 0
        for number, values in enumerate(rows, 1):
            yield Row(dict(values), Origin(file.name, number))
    except LorakitError:
        raise
    # Every error of the library while it parses (Arrow, OS, value errors) is a fault of the file.
    except Exception as error:
        raise DataError(
            f"{file.name}: not a readable Parquet file: {first_line(error.__cause__ or error)}"
        ) from error
    if not number:
        raise DataError(f"{file.name}: the file is empty: no rows in it")


def _local_copy(file: DataFile) -> str:
    """Copy a remote Parquet file to this disk until the process ends, since its index is last."""
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


def _type_name(value: Any) -> str:
    """Name the type of a JSON value, with its article."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _cut(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."
