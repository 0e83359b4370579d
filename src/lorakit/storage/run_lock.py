"""Lock a run directory, so that one process at a time writes into it.

The system releases the lock when the process ends, also if it is killed. The lock file in the run
directory stores the owner's process id.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lorakit.errors import RunError
from lorakit.storage.atomic_dir import write_error
from lorakit.storage.run_dir import RunDir

LOCK = ".lock"
# Another process can remove the empty folder in each attempt.
ATTEMPTS = 100


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
    lock = FileLock(path, blocking=False, mode=0o644)
    try:
        _acquire(lock, run)
    except Timeout:
        raise _taken(run) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise write_error(path, error) from error
        say(f"note: this file system has no locks: do not start a second run into {run.path}")
    with suppress(PermissionError):  # Windows: nobody can write into a locked file
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()
        for folder in created:
            with suppress(OSError):  # not empty: the run wrote files
                folder.rmdir()


def lock_owner(folder: Path) -> int | None:
    """Process that holds the lock of a run directory, or None.

    The lock file may come from anyone: only a process that has this very file open counts.
    """
    lock = folder / LOCK
    try:
        process = int(lock.read_text(encoding="utf-8"))
        opened = psutil.Process(process).open_files()
        same = any(os.path.samefile(found.path, lock) for found in opened if LOCK in found.path)
    except (OSError, ValueError, OverflowError, psutil.Error):
        return None
    return process if same else None


def _acquire(lock: FileLock, run: RunDir) -> None:
    """Lock the folder, and make it if another process removed it in between."""
    for attempt in range(ATTEMPTS):
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            return
        except (FileExistsError, FileNotFoundError):
            # mkdir found the folder and, looking again, did not; or the lock's folder is gone.
            if attempt + 1 == ATTEMPTS or run.path.is_file():
                raise


def _taken(run: RunDir) -> RunError:
    process = ""
    with suppress(OSError):
        process = (run.path / LOCK).read_text(encoding="utf-8").strip()
    return RunError(
        f"{run.path}: another run is writing into this folder (process {process or 'unknown'})",
        hint=f"wait for it, stop it with `kill -INT {process or 'PROCESS'}` (it saves first), or "
        "choose another folder with --output",
    )
