"""A run directory enters; one process at a time writes into it.

The kernel holds the lock and frees it with the process, however that ends: a lock left by a killed
run is none. The file beside the recipe is there to be locked, and to say whose lock it is.
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
    """Hold `run` for this process; a folder made for that and left empty goes again.

    Args:
        say: told when the file system knows no locks, so that nothing keeps a second run out.

    Raises:
        RunError: another process writes into it.
        WorkError: it cannot be written.
    """
    made = [p for p in (run.path, *run.path.parents) if not p.exists()]
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
        say(f"note: no locks on this file system: start no second run into {run.path}")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        for folder in made:
            with suppress(OSError):  # not empty: the run left something
                folder.rmdir()


def _lock(path: Path) -> tuple[int, bool]:
    """An open handle of the file that lies at `path`, and whether it could be locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the name between the two lines above.
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
        hint=f"wait for it, stop it with `kill -INT {process}` (it saves first), or give another "
        "name with --output",
    )
