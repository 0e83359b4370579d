"""Cache of prepared data folders, each made once per key.

The folders are in $XDG_CACHE_HOME/lorakit/data (~/.cache by default), named by a hash of everything
that determines their content. The least recently used ones are deleted when there are too many; the
cache may be deleted at any time: `rm -r ~/.cache/lorakit/data`.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.errors import WorkError
from lorakit.storage.atomic_dir import flush
from lorakit.storage.user_cache import user_cache, writable_cache

# A million chats of 210 characters take about 0.9 GB.
MOST_BYTES = 20 * 2**30
MOST_FOLDERS = 200
_SIZES, _MAKING = "sizes.json", ".making-"


def key_of(*parts: Any) -> str:
    """Hash `parts` (JSON values) and the code of this version into a key."""
    text = json.dumps([_code(), *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def folder_for(key: str | None, make: Callable[[Path], None]) -> Path:
    """Return the folder that `make` filled for `key`, in this or an earlier run.

    Args:
        key: None for content that is not known before it is read, which must not be reused; the
            folder is then deleted when the process ends.
        make: fills the folder that it is given; if it raises, the folder is deleted.

    Raises:
        WorkError: the disk is full. Other errors of `make` are passed on.
    """
    home = cache_home()
    target = home / key if key else None
    if target and _complete(target):
        with suppress(OSError):  # a cache that another user shares can be read only
            os.utime(target)
        return target
    try:
        home = writable_cache(home)
        target = home / key if key else None
        if target and _complete(target):
            return target
        work = Path(tempfile.mkdtemp(prefix=_MAKING, dir=home))
    except OSError as error:
        raise _unwritable(home, error) from error
    try:
        make(work)
        sizes = {path.name: path.stat().st_size for path in work.iterdir()}
        (work / _SIZES).write_text(json.dumps(sizes))
        # A size check alone would miss bytes that a power cut kept from the disk.
        for path in (*work.iterdir(), work):
            flush(path)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise _unwritable(home, error) from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if target is None:
        atexit.register(shutil.rmtree, work, ignore_errors=True)
        return work
    return _settle(work, target, home)


def folder_key(folder: Path) -> str:
    """Key of a folder by the content of its files."""
    digests = []
    for path in sorted(p for p in folder.iterdir() if p.name != _SIZES):
        with path.open("rb") as handle:
            digests.append([path.name, hashlib.file_digest(handle, "sha256").hexdigest()])
    return key_of("content", digests)


def cache_home() -> Path:
    """Folder of the cache of prepared data."""
    return user_cache() / "data"


def _settle(work: Path, target: Path, home: Path) -> Path:
    """Rename `work` to its final name; if another process was faster, its folder is used."""
    if target.exists() and not _complete(target):
        shutil.rmtree(target, ignore_errors=True)
    try:
        work.replace(target)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        if not _complete(target):
            raise _unwritable(home, error) from error
    _prune(home, keep=target)
    return target


def _complete(folder: Path) -> bool:
    """True if all files exist with the sizes that were written."""
    try:
        sizes = json.loads((folder / _SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _prune(home: Path, keep: Path) -> None:
    folders = []
    for entry in os.scandir(home):
        try:
            if entry.name.startswith(_MAKING):
                if entry.stat().st_mtime < time.time() - 86400:  # of a killed process
                    shutil.rmtree(entry.path, ignore_errors=True)
                continue
            sizes = json.loads((Path(entry.path) / _SIZES).read_text())
            folders.append((entry.stat().st_mtime, sum(sizes.values()), Path(entry.path)))
        except (OSError, ValueError):  # another process is writing or deleting it
            continue
    remaining = MOST_BYTES
    for index, (_, size, path) in enumerate(sorted(folders, reverse=True)):
        remaining -= size
        # An open memory map outlives the name of its file, so a run that reads it continues.
        if (remaining < 0 or index >= MOST_FOLDERS) and path != keep:
            shutil.rmtree(path, ignore_errors=True)


def _unwritable(home: Path, error: OSError) -> WorkError:
    return WorkError(
        f"prepared data cannot be kept in {home}: {error.strerror or error}",
        hint="free some space, or set XDG_CACHE_HOME to a folder on another disk",
    )


@functools.cache
def _code() -> str:
    """Hash of the code that prepares data, so that a new version does not reuse old folders."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), here.parent / "types.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
