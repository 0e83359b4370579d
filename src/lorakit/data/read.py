"""A source string enters; its rows leave one by one, each with its place for later messages.

JSON and CSV are read line by line with the standard library. `datasets` would turn date-like
strings into timestamps and the answers "NA" and "None" into nulls, and names no line of a broken
file (docs/log.md has the trials). Parquet, whose types are written in the file, and hub datasets
go through `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lorakit.data.locate import DataFile, HubData, locate
from lorakit.errors import DataError
from lorakit.records import Origin, Row

# One row of 64 MiB is about 15 million tokens: beyond it, a file is damaged or a trap (zip bomb).
LONGEST_LINE = 64 * 2**20
LARGEST_WHOLE_FILE = 2 * 2**30
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
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
        DataError: missing, empty, damaged or undecodable; names file, line and column.
    """
    located = locate(source, folders)
    if isinstance(located, HubData):
        yield from _read_hub(located, source, offline)
        return
    for file in located:
        if offline and "://" in file.path and not file.path.startswith(("file:", "memory:")):
            raise DataError(f"{source}: cannot be fetched offline", hint="download it first")
        yield from READERS[file.kind](file)


def content_key(source: str, folders: Sequence[Path] = ()) -> list[Any] | None:
    """Names and hashes of the files of `source`; None where its content is known only when read."""
    located = locate(source, folders)
    if isinstance(located, HubData) or any("://" in file.path for file in located):
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


# -- bytes and lines ------------------------------------------------------------------------------


@contextmanager
def _open(file: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of `file`, unpacked if gzipped; failures of the disk or network name the file."""
    try:
        with _raw(file) as raw:
            buffered = io.BufferedReader(cast(Any, raw))
            packed = buffered.peek(2)[:2] == b"\x1f\x8b"
            yield cast(IO[bytes], gzip.GzipFile(fileobj=buffered)) if packed else buffered
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file.name}: the gzip file is damaged: {error}", hint=f"test it: gzip -t {file.name}"
        ) from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error


def _raw(file: DataFile) -> IO[bytes]:
    if "://" not in file.path:
        return open(file.path, "rb", buffering=0)
    import fsspec  # type: ignore[import-untyped]

    try:
        return cast(IO[bytes], fsspec.open(file.path, "rb").open())
    except (ImportError, ValueError) as error:
        raise DataError(f"{file.path}: {error}", hint="download it first") from error


def _lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of each line. Lines end at \\n only: U+2028 is text."""
    offset, number, empty = 0, 0, True
    with _open(file) as handle:
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{file.name}:{number}: a line of more than {LONGEST_LINE // 2**20} MiB",
                    hint="one row belongs on one line; is the file damaged?",
                )
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                offset, line = 3, line[3:]
            empty = empty and not line
            yield number, _decode(line, file, number, offset)
            offset += len(line)
    if empty:
        raise DataError(f"{file.name}: the file is empty")


def _decode(data: bytes, file: DataFile, line: int, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = offset == 0 and data.startswith(_UTF16)
        guess = "UTF-16" if utf16 else "WINDOWS-1252"
        raise DataError(
            f"{file.name}:{line}: not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start} of the file" + (" (it looks like UTF-16)" if utf16 else ""),
            hint=f"convert it: iconv -f {guess} -t UTF-8 {file.name} > utf8-{file.name}",
        ) from error


def _whole(file: DataFile) -> str:
    """The decoded text of a file that must be read in one piece."""
    pieces, size = [], 0
    for _, line in _lines(file):
        size += len(line)
        if size > LARGEST_WHOLE_FILE:
            raise DataError(
                f"{file.name}: more than {LARGEST_WHOLE_FILE // 2**30} GiB in one piece",
                hint="split it, or write it as .jsonl, which is read row by row",
            )
        pieces.append(line)
    return "".join(pieces)


# -- the kinds of files ---------------------------------------------------------------------------


def _read_json(file: DataFile) -> Iterator[Row]:
    """JSON lines, or one JSON array or object, told apart by content: names are often wrong."""
    lines = ((number, line) for number, line in _lines(file) if not line.isspace())
    first = next(lines, None)
    if first is None:
        raise DataError(f"{file.name}: only blank lines")
    if _is_one_value(first[1], file.kind, next(lines, None)):
        yield from _json_items(file)
        return
    for number, line in _lines(file):
        if line.isspace():
            continue
        value = _parse(line.rstrip("\r\n"), file, number, last=not line.endswith("\n"))
        if not isinstance(value, dict):
            raise DataError(
                f"{file.name}:{number}: {_a(value)} where an object {{...}} is expected: "
                f"{_cut(line.strip())}",
                hint='write each row as {"instruction": "...", "response": "..."}',
            )
        yield Row(value, Origin(file.name, number))


def _is_one_value(first: str, kind: str, second: tuple[int, str] | None) -> bool:
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        # An opened bracket that the line does not close: a pretty-printed file.
        opened = first.strip() in ("[", "{") or first.lstrip().startswith("[")
        return opened or (kind == ".json" and second is not None and first.lstrip()[:1] == "{")
    return second is None and (isinstance(value, list) or kind == ".json")


def _json_items(file: DataFile) -> Iterator[Row]:
    value = _parse(_whole(file), file, 1, last=False)
    if isinstance(value, dict):
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
        value = value[inner[0]] if inner else [value]
    if not isinstance(value, list):
        raise DataError(f"{file.name}: {_a(value)} where a list of rows is expected")
    if not value:
        raise DataError(f"{file.name}: an empty list, no rows in it")
    for position, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise DataError(
                f"{file.name}: item {position} is {_a(item)}, expected an object {{...}}"
            )
        yield Row(item, Origin(file.name, position))


def _parse(text: str, file: DataFile, line: int, last: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        row, start = line + error.lineno - 1, max(0, error.pos - _SHOWN)
        near = text[start : error.pos + _SHOWN].strip()
        cut_off = last and error.pos >= len(text.rstrip()) - 1
        what = "the last line is cut off" if cut_off or _unclosed(error, last) else error.msg
        raise DataError(
            f"{file.name}:{row}: column {error.colno}: not valid JSON: {what}, near: {_cut(near)}",
            hint="the file was not written to its end; write it anew or remove that line"
            if what != error.msg
            else "see what stands there with: sed -n " + f"{row}p {file.name}",
        ) from error
    except RecursionError:
        raise DataError(f"{file.name}:{line}: nested too deeply to be a row") from None
    except ValueError as error:
        raise DataError(f"{file.name}:{line}: not valid JSON: {error}") from error


def _unclosed(error: json.JSONDecodeError, last: bool) -> bool:
    return last and error.msg.startswith("Unterminated string")


def _read_csv(file: DataFile) -> Iterator[Row]:
    """Every cell stays the text it is: "NA", "None" and "2021-05-03" too."""
    # The csv module's own limit, 128 KiB a cell, is for the whole process; only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    header: list[str] = []
    begun, rows = 1, 0
    reader: Any = None

    def texts() -> Iterator[str]:
        for _, line in _lines(file):
            yield line

    lines = texts()
    try:
        first = next(lines)
        reader = csv.reader(_chain(first, lines), delimiter=_delimiter(first), strict=True)
        for cells in reader:
            if not cells:
                pass
            elif not header:
                header = _header(cells, file)
            elif len(cells) != len(header):
                raise DataError(
                    f"{file.name}:{begun}: {len(cells)} cells where the header has {len(header)} "
                    f"({', '.join(header[:6])})",
                    hint='put cells that hold the separator, a quote or a line end in "quotes"',
                )
            else:
                rows += 1
                yield Row(dict(zip(header, cells, strict=True)), Origin(file.name, begun))
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file.name}:{begun}: not valid CSV: {error} (the row begins on this line, "
            f"the trouble is on line {reader.line_num})",
            hint='a quote inside a quoted cell is written twice: "say ""hi"""',
        ) from error
    if not rows:
        raise DataError(f"{file.name}: a header ({_cut(', '.join(header))}) and no rows below it")


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
    yield Row({"text": _whole(file)}, Origin(file.name, 1))


def _read_parquet(file: DataFile) -> Iterator[Row]:
    import datasets

    try:
        # Streaming reads row group by row group and writes no copy into the cache.
        rows = datasets.load_dataset("parquet", data_files=file.path, split="train", streaming=True)
        number = 0
        for number, values in enumerate(rows, 1):
            yield Row(dict(values), Origin(file.name, number))
    # Whatever the library meets in the bytes (Arrow, OS, value errors) is a fault of the file.
    except Exception as error:
        raise DataError(
            f"{file.name}: not a readable Parquet file: {_first_line(error.__cause__ or error)}"
        ) from error
    if not number:
        raise DataError(f"{file.name}: the file is empty: no rows in it")


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


# -- the hub --------------------------------------------------------------------------------------


def _read_hub(data: HubData, source: str, offline: bool) -> Iterator[Row]:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if offline and not HF_HUB_OFFLINE:
        raise DataError(
            f"{source}: not a file here, and the hub is not asked when offline",
            hint="set HF_HUB_OFFLINE=1 to use a copy that is in the cache already",
        )
    try:
        loaded = datasets.load_dataset(data.repo, data.config, split=data.split)
    # Network, access, name and format troubles come as a dozen types; all mean "not to be had".
    except Exception as error:
        state = "and the hub is offline" if HF_HUB_OFFLINE else "and the hub did not give it"
        raise DataError(
            f"{source}: no such file or folder here, {state}: {_first_line(error)}",
            hint="check the spelling (user/name, user/name:split, user/name:config:split), the "
            "network, and for gated data your token (hf auth login)",
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise DataError(
                f"{source}: which split? It has {', '.join(loaded)}",
                hint=f"write {data.repo}:{next(iter(loaded))}",
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    for number, values in enumerate(loaded, 1):
        yield Row(dict(values), Origin(source, number))


def _a(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _cut(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."


def _first_line(error: BaseException) -> str:
    return f"{error}".strip().split("\n")[0][:200] or type(error).__name__
