"""Folder of lorakit's caches, and a temporary one where that cannot be written."""

from __future__ import annotations

import atexit
import errno
import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


def user_cache() -> Path:
    """Return $XDG_CACHE_HOME/lorakit, by default ~/.cache/lorakit; creates nothing."""
    # Without a home directory (a user id that no account has) the ~ stays.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lorakit"


def writable_cache(folder: Path) -> Path:
    """Create `folder`, a cache; return it, or a temporary folder if it cannot be written.

    The temporary folder is deleted when the process ends, and a note is logged once.

    Raises:
        OSError: the disk is full.
    """
    problem = _problem(folder)
    return _temporary(folder, problem) if problem else folder


def _problem(folder: Path) -> str | None:
    if folder.parts[:1] == ("~",):
        return "this user has no home directory"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        if error.errno in FULL:
            raise
        return error.strerror or str(error)


@functools.cache
def _temporary(folder: Path, problem: str) -> Path:
    made = Path(tempfile.mkdtemp(prefix="lorakit-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    logging.getLogger("lorakit").warning(
        "note: no cache in %s (%s): %s is used until this command ends; XDG_CACHE_HOME names "
        "another folder",
        folder,
        problem,
        made,
    )
    return made
