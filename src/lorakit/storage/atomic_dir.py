"""Write a folder atomically, with a manifest of checksums.

The order makes it safe against power cuts: each file is flushed, the manifest with the checksums is
written and flushed last, then the folder; one rename makes it visible, and its parent is flushed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from lorakit.errors import WorkError

MANIFEST = "MANIFEST.json"
FORMAT = 2  # 1 had pickled files
MANIFEST_BYTES = 2**24
_LEFTOVER = re.compile(r"^\..+\.(?:tmp|old)-(\d+)$")
_WRITE_FAULTS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    None,  # numpy's tofile: "24000 requested and 0 written"
}


class CorruptedError(Exception):
    """A sealed folder differs from its manifest; the message names the difference."""


class OtherFormat(CorruptedError):
    """The manifest has the format of another version."""


@contextmanager
def atomic_directory(
    target: Path, facts: Mapping[str, Any] | None = None, size: int | None = None
) -> Iterator[Path]:
    """Yield a folder to fill that becomes `target` on success and is deleted on failure.

    Args:
        facts: JSON values to store in the manifest.
        size: bytes that will be written, to report how many are missing on a full disk.

    Raises:
        WorkError: the disk is full or cannot be written; `target` is then unchanged.
    """
    aside, old = _temporary(target, "tmp"), _temporary(target, "old")
    try:
        remove_leftovers(target.parent)
        aside.mkdir(parents=True)
        yield aside
        _seal(aside, facts or {})
        if target.exists():
            # Renamed before it is deleted: a kill would leave half of it under its name.
            target.rename(old)
        aside.rename(target)
        flush(target.parent)
        remove_leftovers(target.parent)
    except (OSError, SafetensorError) as error:
        _undo(target, aside, old)
        if not _is_write_fault(error):
            raise
        raise write_error(target, error, size) from error
    except BaseException:
        _undo(target, aside, old)
        raise


def verified(folder: Path) -> dict[str, Any]:
    """Verify that a folder is exactly as `atomic_directory` wrote it, and return its manifest.

    Raises:
        CorruptedError: a file is missing, changed, added or a link, or the manifest was changed.
    """
    manifest = _read_manifest(folder)
    present = dict(_plain_files(folder))
    files = manifest["files"]
    for name in sorted(files.keys() | present.keys()):
        if name not in present:
            raise CorruptedError(f"{name} is missing")
        if name not in files:
            raise CorruptedError(f"{name} is not in the manifest")
        _compare(name, present[name], files[name])
    return manifest


def intact(folder: Path) -> None:
    """Verify that the files present in a finished folder are as `atomic_directory` wrote them.

    Its owner may add or remove files, or delete the manifest to change files.

    Raises:
        CorruptedError: the manifest or one of its files was changed.
    """
    if not os.path.lexists(folder / MANIFEST):
        return
    try:
        files = _read_manifest(folder)["files"]
    except OtherFormat:  # adapters of older versions remain valid
        return
    for name, facts in sorted(files.items()):
        if (folder / name).is_file():
            _compare(name, folder / name, facts)


def _compare(name: str, path: Path, facts: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise CorruptedError(f"{name} has {size:,} bytes, expected {facts['bytes']:,}")
    if _sha256(path) != facts["sha256"]:
        raise CorruptedError(f"{name} was changed")


def discard(folder: Path) -> None:
    """Delete a folder; a kill in the middle does not leave a part of it under its name."""
    old = _temporary(folder, "old")
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(place: Path) -> None:
    """Delete folders in `place` that killed processes left half-written or half-deleted."""
    for entry in os.scandir(place) if place.is_dir() else ():
        match = _LEFTOVER.match(entry.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(entry.path, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush the bytes of a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # Windows opens no folders, and flushes only files open for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    while not path.exists():
        path = path.absolute().parent
    return path


def write_error(target: Path, error: BaseException, size: int | None = None) -> WorkError:
    """Build the error for a failed write of `target`, with the free and the missing space."""
    code = getattr(error, "errno", None)
    text = str(error).lower()
    # safetensors and numpy give the message of the system without its errno.
    full = code in (errno.ENOSPC, errno.EDQUOT) or "space" in text or "requested and" in text
    reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
    free = free_bytes(target)
    space = f"{megabytes(free)} free"
    if size is not None:
        space = f"it takes {megabytes(size)}, {space}"
        if full:
            space += f", {megabytes(max(size - free, 0))} missing"
    if full:
        hint = "free some space"
    elif code == errno.EFBIG or "too large" in text:
        hint = "lift the limit on the size of files (ulimit -f), or choose another disk"
    else:
        hint = "make the folder writable, or choose another with --output"
    return WorkError(
        f"cannot write {target}: {reason} ({space})",
        hint=f"{hint}, then run the command again (training: with --resume); nothing half-written "
        "was left",
    )


def megabytes(size: int) -> str:
    """Format bytes as kB or MB."""
    if size < 1e5:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def _undo(target: Path, aside: Path, old: Path) -> None:
    if old.exists() and not target.exists():
        old.rename(target)
    for folder in (aside, old):
        shutil.rmtree(folder, ignore_errors=True)


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    files = {}
    for name, path in sorted(_plain_files(folder)):
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        flush(path)
    (folder / MANIFEST).write_bytes(_manifest({**facts, "format": FORMAT, "files": files}))
    flush(folder / MANIFEST)
    for sub in sorted(p for p in folder.rglob("*") if p.is_dir()):
        flush(sub)
    flush(folder)


def _manifest(values: Mapping[str, Any]) -> bytes:
    """Serialize a manifest with a checksum of its content."""
    seal = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**values, "seal": seal}, sort_keys=True, indent=1) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MANIFEST_BYTES:
            raise CorruptedError(f"{MANIFEST} is not a manifest")
        raw = path.read_bytes()
        values = json.loads(raw)
        if values.get("format", 1) != FORMAT:
            raise OtherFormat(
                f"it has format {values.get('format', 1)}, this version reads {FORMAT}"
            )
        values.pop("seal", None)
        # Serialized again from the parsed values, to detect any changed byte.
        if _manifest(values) != raw:
            raise CorruptedError(f"{MANIFEST} was changed")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CorruptedError(f"{MANIFEST} is missing or unreadable") from None
    return dict(values)


def _plain_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name in `folder`, path) of each file but the manifest; links are not followed.

    Raises:
        CorruptedError: an entry is a link or a special file.
    """
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in folders + files:
            path = Path(parent) / name
            inside = str(path.relative_to(folder))
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                if inside != MANIFEST:
                    yield inside, path
            elif not stat.S_ISDIR(mode):
                raise CorruptedError(
                    f"{inside} is {'a link' if stat.S_ISLNK(mode) else 'not a regular file'}"
                )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _temporary(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}-{os.getpid()}")


def _is_write_fault(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _WRITE_FAULTS
    text = str(error).lower()
    return "i/o" in text or "os error" in text
