"""Lock a run directory, so that one process at a time writes into it.

The kernel releases the lock when the process ends, also if it is killed. The lock file in the run
directory stores the owner's process id.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import RunError
from lorakit.storage.atomic_dir import write_error
from lorakit.storage.run_dir import RunDir

LOCK = ".lock"


@contextmanager
def only_writer(run: RunDir, say: Callable[[str], None]) -> Iterator[None]:
    """Lock `run` for this process; folders created for it are removed if they are empty at the end.

    Args:
        say: prints a note if the file system does not support locks, so that a second run would not
            be refused.

    Raises:
        RunError: another process writes into the run directory.
        WorkError: the lock file cannot be written.
    """
    created = [p for p in (run.path, *run.path.parents) if not p.exists()]
    path = run.path / LOCK
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        handle, held = _lock(path)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise _taken(run, path) from None
        raise write_error(path, error) from error
    if not held:
        say(f"note: this file system has no locks: do not start a second run into {run.path}")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        for folder in created:
            with suppress(OSError):  # not empty: the run wrote files
                folder.rmdir()


def _lock(path: Path) -> tuple[int, bool]:
    """Open the file at `path` and lock it.

    Returns:
        The open handle, and False if the file system does not support locks.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last owner may have deleted the file between the two calls above.
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle, True
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return handle, False
            os.close(handle)
            raise
        os.close(handle)


def _taken(run: RunDir, path: Path) -> RunError:
    try:
        process = path.read_text(encoding="utf-8").strip() or "unknown"
    except OSError:
        process = "unknown"
    return RunError(
        f"{run.path}: another run is writing into this folder (process {process})",
        hint=f"wait for it, stop it with `kill -INT {process}` (it saves first), or choose another "
        "folder with --output",
    )
