"""A source's name enters; raw rows leave, each with the file and row it came from.

JSON, JSONL and CSV are parsed with the standard library, not by pyarrow or pandas: those turn
date-like strings into timestamps and answers such as "NA" into nulls, and cannot name a broken
line. Parquet and hub data sets go through `datasets`.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorakit.errors import DataError
from lorakit.records import Origin, Row

PACKAGED = {"demo": "demo_train.jsonl", "demo:heldout": "demo_heldout.jsonl"}
# A field longer than this in one CSV cell is more likely a stray quote than an answer.
csv.field_size_limit(10_000_000)


def read_rows(
    source: str, folders: Sequence[Path] = (Path(),), *, offline: bool = False
) -> Iterator[Row]:
    """All rows of one source, in order.

    Args:
        source: `demo`, a file, a folder, a glob, or a hub data set `user/name[:split]`.
        folders: where a relative path is looked for, first match wins.
        offline: never ask the hub.

    Raises:
        DataError: missing, empty, not UTF-8, or damaged; names the file and the line.
    """
    if source in PACKAGED:
        path = Path(str(files("lorakit") / "assets" / PACKAGED[source]))
        yield from _read_file(path, source)
        return
    paths = _find(source, folders)
    if paths:
        for path in paths:
            yield from _read_file(path, path.name)
        return
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w\[\]:%+-]+)?", source) and not Path(source).suffix:
        yield from _read_hub(source, offline)
        return
    raise _not_found(source)


def _find(source: str, folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        path = folder / Path(source).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in READERS)
            if not found:
                names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
                raise DataError(
                    f"{source}: no data file in this folder (found: {names})",
                    hint=f"files end in {', '.join(READERS)}, or one of these with .gz",
                )
            return found
        if glob.has_magic(source):
            matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
            if matches:
                return [p for p in matches if p.is_file()]
    return []


def _not_found(source: str) -> DataError:
    path = Path(source)
    parent = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1)
    guess = f"; did you mean {parent / near[0]}?" if near else ""
    return DataError(
        f"data: {source}: no such file or folder{guess}",
        hint="give a .jsonl, .json, .csv, .parquet or .txt file, a folder of them, or `demo`",
    )


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path, name: str) -> Iterator[Row]:
    reader = READERS.get(_kind(path))
    if reader is None:
        raise DataError(
            f"{path}: files of this kind are not read",
            hint=f"files end in {', '.join(READERS)}, or one of these with .gz",
        )
    empty = True
    for row in reader(path, name):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: the file is empty", hint="it needs at least two rows")


def _text(path: Path) -> str:
    """The whole file as text; a byte order mark is dropped.

    Raises:
        DataError: unreadable, damaged gzip, or not UTF-8 (names the line).
    """
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte {raw[error.start]:#04x})",
            hint=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}",
        ) from error


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    text = _text(path)
    if text.lstrip().startswith("["):
        yield from _rows_of_array(path, name, text)
        return
    # Only \n ends a line: U+2028 and friends may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Row(_object(path, number, _parse(path, number, line)), Origin(name, number))


def _read_json(path: Path, name: str) -> Iterator[Row]:
    text = _text(path)
    if not text.strip():
        return
    if text.lstrip().startswith("["):
        yield from _rows_of_array(path, name, text)
    elif "\n{" in text.strip().replace("\r", ""):
        yield from _read_jsonl(path, name)
    else:
        value = _object(path, 1, _parse(path, 1, text))
        tables = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if len(tables) == 1 and "messages" not in value and "conversations" not in value:
            for number, row in enumerate(tables[0], start=1):
                yield Row(_object(path, number, row), Origin(name, number))
        else:
            yield Row(value, Origin(name, 1))


def _rows_of_array(path: Path, name: str, text: str) -> Iterator[Row]:
    for number, value in enumerate(_parse(path, 1, text), start=1):
        yield Row(_object(path, number, value, "item"), Origin(name, number))


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise DataError(f"{path}: line {number}: nested too deeply to read") from error
        at = max(0, error.pos - 30)
        around = line[at : error.pos + 20].strip().replace("\n", " ")
        raise DataError(
            f"{path}: line {number + error.lineno - 1}, column {error.colno}: "
            f"not valid JSON: {error.msg} (near: {around!r})",
            hint="each line holds one JSON object; was the file cut off or edited by hand?",
        ) from error


def _object(path: Path, number: int, value: Any, what: str = "line") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: {what} {number}: expected an object with named columns, "
            f"found {type(value).__name__}",
            hint='a row looks like {"instruction": "...", "response": "..."}',
        )
    return value


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    text = _text(path)
    separator = "\t" if _kind(path) == ".tsv" else _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}: line {reader.line_num}: {len(cells)} cells, the header has "
                    f"{len(header)} ({', '.join(header[:6])})",
                    hint="a stray quote or comma? a cell that holds a comma needs quotes around it",
                )
            values = dict(zip(header, cells, strict=True))
            yield Row(values, Origin(name, reader.line_num))
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num}: not valid CSV: {error}",
            hint='quotes inside a quoted cell are doubled: "say ""hi"""',
        ) from error


def _separator(text: str) -> str:
    first = text.split("\n", 1)[0]
    return max(",;\t", key=first.count)


def _read_text(path: Path, name: str) -> Iterator[Row]:
    text = _text(path)
    if text.strip():
        yield Row({"text": text}, Origin(name, 1))


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(values, Origin(name, number))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path}: not a whole Parquet file: {first}") from error


def _read_hub(source: str, offline: bool) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        if offline:
            raise ConnectionError("--offline forbids it")
        data = load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises many kinds
        raise DataError(
            f"data: {source}: no local file, and the hub data set cannot be loaded: "
            f"{str(error).splitlines()[0]}",
            hint="check the spelling and the network; a split is named as user/name:train",
        ) from error
    for number, values in enumerate(data, start=1):
        yield Row(dict(values), Origin(name, number))


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
