"""A folder to fill enters; it leaves whole, on the disk and sealed, or not at all.

The order matters when the power goes: each file is flushed, the manifest with their checksums is
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
    """A sealed folder is not as it was left; says what was found."""


class OtherFormat(CorruptedError):
    """The manifest is of another version."""


@contextmanager
def atomic_directory(
    target: Path, facts: Mapping[str, Any] | None = None, size: int | None = None
) -> Iterator[Path]:
    """A folder to fill that becomes `target` on success and vanishes on failure.

    Args:
        facts: JSON values that the manifest binds to the files.
        size: bytes that will be written, to say how many are missing where there is no room.

    Raises:
        WorkError: the disk is full or cannot be written; `target` is then as it was before.
    """
    aside, old = _beside(target, "tmp"), _beside(target, "old")
    try:
        remove_leftovers(target.parent)
        aside.mkdir(parents=True)
        yield aside
        _seal(aside, facts or {})
        if target.exists():
            # Not deleted under its name: a kill would leave half of it there.
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
    """The manifest of a folder in which every byte is as `atomic_directory` left it, and nothing
    was added.

    Raises:
        Damaged: a file is missing, changed, foreign or a link, or the manifest was changed.
    """
    manifest = _read_manifest(folder)
    present = dict(_plain_files(folder))
    files = manifest["files"]
    for name in sorted(files.keys() | present.keys()):
        if name not in present:
            raise CorruptedError(f"{name} is missing")
        if name not in files:
            raise CorruptedError(f"{name} is foreign to it")
        _compare(name, present[name], files[name])
    return manifest


def intact(folder: Path) -> None:
    """The files of a finished folder that are there are as `atomic_directory` left them.

    Its owner may add a README, take a file out, or delete the manifest to change what he likes.

    Raises:
        Damaged: the manifest or one of its files was changed.
    """
    if not os.path.lexists(folder / MANIFEST):
        return
    try:
        files = _read_manifest(folder)["files"]
    except OtherFormat:  # an older version's adapter is for ever
        return
    for name, facts in sorted(files.items()):
        if (folder / name).is_file():
            _compare(name, folder / name, facts)


def _compare(name: str, path: Path, facts: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise CorruptedError(f"{name} has {size:,} bytes instead of {facts['bytes']:,}")
    if _sha256(path) != facts["sha256"]:
        raise CorruptedError(f"{name} was changed")


def discard(folder: Path) -> None:
    """Delete a folder; a kill in the middle leaves none of it under its own name."""
    old = _beside(folder, "old")
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(place: Path) -> None:
    """Delete what killed processes left half-written, or half-deleted, in `place`."""
    for entry in os.scandir(place) if place.is_dir() else ():
        found = _LEFTOVER.match(entry.name)
        if found and (int(found[1]) == os.getpid() or not _runs(int(found[1]))):
            shutil.rmtree(entry.path, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int:
    """Free space where `path` is, or will be."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def write_error(target: Path, error: BaseException, size: int | None = None) -> WorkError:
    """What went wrong with writing `target`, and how much room is missing."""
    number = getattr(error, "errno", None)
    text = str(error).lower()
    # safetensors and numpy give the system's words without its number.
    full = number in (errno.ENOSPC, errno.EDQUOT) or "space" in text or "requested and" in text
    said = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
    free = free_bytes(target)
    room = f"{megabytes(free)} free"
    if size is not None:
        room = f"it takes {megabytes(size)}, {room}"
        if full:
            room += f", {megabytes(max(size - free, 0))} missing"
    if full:
        hint = "free some space"
    elif number == errno.EFBIG or "too large" in text:
        hint = "lift the limit on the size of files (ulimit -f), or choose another disk"
    else:
        hint = "make the folder writable, or choose another with --output"
    return WorkError(
        f"cannot write {target}: {said} ({room})",
        hint=f"{hint}, then run the command again (training: with --resume); nothing half-written "
        "was left",
    )


def megabytes(size: int) -> str:
    """Bytes in words a disk's owner thinks in."""
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
    """The manifest's bytes, a checksum of its own content among them."""
    seal = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**values, "seal": seal}, sort_keys=True, indent=1) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MANIFEST_BYTES:
            raise CorruptedError(f"{MANIFEST} is no manifest")
        raw = path.read_bytes()
        values = json.loads(raw)
        if values.get("format", 1) != FORMAT:
            raise OtherFormat(
                f"it has format {values.get('format', 1)}, this version reads {FORMAT}"
            )
        values.pop("seal", None)
        # Written again from what was read: a byte that differs anywhere shows.
        if _manifest(values) != raw:
            raise CorruptedError(f"{MANIFEST} was changed")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CorruptedError(f"{MANIFEST} is missing or unreadable") from None
    return dict(values)


def _plain_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name inside `folder`, path) of each file but the manifest; links are never followed."""
    for place, folders, files in os.walk(folder, followlinks=False):
        for name in folders + files:
            path = Path(place) / name
            inside = str(path.relative_to(folder))
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                if inside != MANIFEST:
                    yield inside, path
            elif not stat.S_ISDIR(mode):
                raise CorruptedError(
                    f"{inside} is {'a link' if stat.S_ISLNK(mode) else 'no plain file'}"
                )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_write_fault(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _WRITE_FAULTS
    text = str(error).lower()
    return "i/o" in text or "os error" in text
