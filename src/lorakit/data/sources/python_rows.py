"""Write the rows of a Python object to a file, which a run reads like any other source.

Formats, checks, messages with row numbers and the cache of prepared data are then those of files,
and a run that was started from an object resumes from the command line too.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data import cache
from lorakit.errors import DataError, WorkError, first_line
from lorakit.storage.user_cache import writable_cache


def write_rows(rows: Any, name: str) -> Path:
    """Write a dataset or a list of dicts as JSON lines into the cache of prepared data.

    The file is named by its content, so that the same rows give the same file.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset`, or an iterable of dicts.
        name: argument that `rows` was given as, for the name of the file and for messages.

    Raises:
        DataError: `rows` has another type, or a value that is not text, a number, a list or a dict.
        WorkError: the cache cannot be written.
    """
    source = _iterable(rows, name)
    try:
        home = writable_cache(cache.cache_home())
        with tempfile.TemporaryDirectory(prefix=cache.MAKING, dir=home) as folder:
            made, digest = Path(folder) / "rows.jsonl", hashlib.sha256()
            with made.open("wb") as out:
                for number, row in enumerate(source, 1):
                    line = _line(row, f"{name}:{number}")
                    digest.update(line)
                    out.write(line)
            return made.replace(home / f"{name}-{digest.hexdigest()[:16]}.jsonl")
    except OSError as error:
        raise WorkError(
            f"{name}: rows cannot be written to {cache.cache_home()}: {error.strerror or error}",
            hint="free some space, or set XDG_CACHE_HOME to a folder on another disk",
        ) from error


def _iterable(rows: Any, name: str) -> Iterable[Any]:
    kind = type(rows).__name__
    if isinstance(rows, Mapping):  # a DatasetDict is a dict of splits
        splits = ", ".join(map(str, rows))
        raise DataError(
            f"{name} is a {kind} with the keys {splits[:80]}, expected rows",
            hint=f"give one split, such as {name}=data['train'], or a list of dicts",
        )
    if isinstance(rows, str | Path):
        raise DataError(
            f"{name} is a {kind}, expected a dataset or a list of dicts",
            hint="name files and hub datasets with data=... or val_data=...",
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        raise DataError(
            f"{name} is a {kind}, expected a dataset or a list of dicts",
            hint=f"{name}=datasets.Dataset.from_pandas(table)",
        )
    if not isinstance(rows, Iterable):
        raise DataError(f"{name} is a {kind}, expected a datasets.Dataset or a list of dicts")
    return rows


def _line(row: Any, where: str) -> bytes:
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where}: the row is a {type(row).__name__}, expected a dict",
            hint='write each row as {"instruction": "...", "response": "..."}',
        )
    column = ""

    def encode(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        raise DataError(
            f"{where}: column {column!r} has a {type(value).__name__}, which is not text",
            hint=f"convert it, or leave it out: remove_columns({column!r})",
        )

    parts = []
    for column, value in row.items():
        try:
            text = json.dumps(value, default=encode)
        except (TypeError, ValueError) as error:  # a key that is a tuple, a list in itself
            raise DataError(f"{where}: column {column!r}: {first_line(error)}") from error
        parts.append(f"{json.dumps(str(column))}: {text}")
    return f"{{{', '.join(parts)}}}\n".encode()
