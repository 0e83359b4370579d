"""Cache of Arrow files of prepared data, each made once per key.

An entry is `<key>.arrow` and `<key>.json` in $XDG_CACHE_HOME/lorakit/data (~/.cache by default),
where the key is a hash of everything that determines the content. The JSON file has the checksum: a
file that a power cut or a fault of the disk damaged is made again. The least recently used entries
are deleted when there are too many; the cache may be deleted at any time:
`rm -r ~/.cache/lorakit/data`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from lorakit.errors import WorkError
from lorakit.storage.user_cache import user_cache, writable_cache

# A million chats of 210 characters take about 1.2 GB.
MOST_BYTES = 20 * 2**30
MOST_ENTRIES = 200
MAKING = ".making-"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A memory-mapped Arrow table, and the JSON values that its writer returned."""

    table: Dataset
    meta: dict[str, Any]
    key: str


def key_of(*parts: Any) -> str:
    """Hash `parts` (JSON values) and the code of this version into a key."""
    text = json.dumps([_code(), *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(key: str | None, write: Callable[[Path], dict[str, Any]]) -> CacheEntry:
    """Return the entry that `write` made for `key`, in this or an earlier run.

    Args:
        key: None for content that is not known before it is read: it is written each time, and its
            key is a hash of what was written.
        write: writes an Arrow stream to the path that it is given, and returns JSON values to keep
            with it; if it raises, nothing is kept.

    Raises:
        WorkError: the disk is full. Other errors of `write` are passed on.
    """
    home = cache_home()
    if key and (entry := _intact(home / f"{key}.arrow")):
        return entry
    try:
        home = writable_cache(home)
        if key and (entry := _intact(home / f"{key}.arrow")):
            return entry
        with tempfile.TemporaryDirectory(prefix=MAKING, dir=home) as folder:
            data, record = Path(folder) / "data.arrow", Path(folder) / "data.json"
            meta = write(data)
            checksum = _sha256(data, meta)
            record.write_text(json.dumps({"sha256": checksum, "meta": meta}))
            key = key or key_of("content", checksum)
            # Another process that wrote the same key meanwhile wrote the same bytes.
            data.replace(home / f"{key}.arrow")
            record.replace(home / f"{key}.json")
    except OSError as error:
        raise WorkError(
            f"prepared data cannot be kept in {home}: {error.strerror or error}",
            hint="free some space, or set XDG_CACHE_HOME to a folder on another disk",
        ) from error
    _prune(home, keep=key)
    return CacheEntry(Dataset.from_file(str(home / f"{key}.arrow")), meta, key)


def cache_home() -> Path:
    """Folder of the cache of prepared data."""
    return user_cache() / "data"


def _intact(path: Path) -> CacheEntry | None:
    """The entry at `path`, marked as used; None if it is missing or differs from its checksum."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        if record["sha256"] != _sha256(path, record["meta"]):
            return None
        with suppress(OSError):  # a cache that another user shares can be read only
            os.utime(path)
        return CacheEntry(Dataset.from_file(str(path)), record["meta"], path.stem)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path, meta: dict[str, Any]) -> str:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
    digest.update(json.dumps(meta).encode())
    return digest.hexdigest()


def _prune(home: Path, keep: str) -> None:
    entries = []
    for path in home.iterdir():
        try:
            facts = path.stat()
            if path.suffix in (".arrow", ".jsonl"):  # rows of Python objects are JSON lines
                entries.append((facts.st_mtime, facts.st_size, path))
            elif path.is_dir() and facts.st_mtime < time.time() - 86400:
                # Of a killed process, or of a version that kept folders.
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # another process moved or deleted it
            continue
    remaining = MOST_BYTES
    for index, (_, size, path) in enumerate(sorted(entries, reverse=True)):
        remaining -= size
        # An open memory map outlives the name of its file, so a run that reads it continues.
        if (remaining < 0 or index >= MOST_ENTRIES) and path.stem != keep:
            for name in (path.with_suffix(".json"), path):
                name.unlink(missing_ok=True)


@functools.cache
def _code() -> str:
    """Hash of the code that prepares data, so that a new version does not reuse old entries."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), here.parent / "types.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
