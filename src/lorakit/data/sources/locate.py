"""A source string of a recipe enters; the files to read, or a hub dataset id, leave.

A source is `demo`, a file, a folder, a glob, an address (https://, s3://, ... through fsspec) or a
hub dataset `user/name[:config][:split]`. What exists on this disk wins over the hub.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lorakit.data.sources.http import check_scheme, drive_link
from lorakit.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
PACKAGED = {"demo": "demo_train.jsonl", "demo:heldout": "demo_heldout.jsonl"}
# In a folder these describe the data and are none of it.
ABOUT_DATA = re.compile(r"(readme|license|licence|changelog)\b.*", re.IGNORECASE)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file to read: where it is, the short name used in messages, and its kind (a suffix).

    The kind is "" where only the server can tell it.
    """

    path: str
    name: str
    kind: str

    @property
    def typed(self) -> str:
        """As a shell takes it, from any folder."""
        return shlex.quote(self.name if self.remote else self.path)

    @property
    def remote(self) -> bool:
        """An address, not a path."""
        return "://" in self.path


@dataclass(frozen=True, slots=True)
class HubData:
    """A dataset on the hub; None means the default config, or the split `train`."""

    repo: str
    config: str | None = None
    split: str | None = None


def locate(source: str, folders: Sequence[Path] = ()) -> list[DataFile] | HubData:
    """What to read for `source`; relative paths are tried here, then against each of `folders`.

    Raises:
        DataError: nothing is there, or a folder holds no file of a known kind.
    """
    if source in PACKAGED:
        path = str(files("lorakit") / "assets" / PACKAGED[source])
        return [DataFile(path, source, ".jsonl")]
    if "://" in source:
        check_scheme(source)
        drive = drive_link(source)
        name = "Google Drive file" if drive else source.split("?")[0].rsplit("/", 1)[-1]
        return [DataFile(source, name or source, "" if drive else kind_of(source) or "")]
    places = _places(source, folders)
    for place in places:
        if os.path.isdir(place):
            return _folder_files(place, source)
        if os.path.exists(place):
            return [DataFile(place, os.path.basename(place), _kind_or_refuse(place))]
    if glob.has_magic(source):
        for place in places:
            found = _glob_files(place)
            if found:
                return found
    hub = _hub_data(source)
    if hub:
        return hub
    raise _nothing_there(source, places)


def kind_of(path: str) -> str | None:
    """The suffix that decides how a file is read, looking through `.gz`; None if unknown."""
    name = path.lower().split("?")[0].removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _places(source: str, folders: Sequence[Path]) -> list[str]:
    path = os.path.expanduser(source)
    bases = [""] if os.path.isabs(path) else ["", *(str(folder) for folder in folders)]
    # An empty source joined to a folder would be the folder itself.
    return list(dict.fromkeys(os.path.join(base, path) for base in bases)) if path else []


def _kind_or_refuse(path: str) -> str:
    kind = kind_of(path)
    if kind is None:
        raise DataError(
            f"{path}: a file of this kind cannot be read",
            hint=f"known kinds: {' '.join(SUFFIXES)} (and .gz of the text kinds)",
        )
    return kind


def _walk(folder: str) -> Iterator[str]:
    """Paths of all visible files under `folder`, sorted; linked folders are not entered."""
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (os.path.join(place, n) for n in sorted(names) if not n.startswith("."))


def _folder_files(folder: str, source: str) -> list[DataFile]:
    found, others = [], []
    for path in _walk(folder):
        kind = kind_of(path)
        if kind is None or ABOUT_DATA.match(os.path.basename(path)):
            others.append(os.path.basename(path))
        elif not os.path.isfile(path):
            raise DataError(f"{path}: a link that leads nowhere", hint="remove it or mend it")
        elif _escapes(path, folder):
            raise DataError(
                f"{path}: a link that leads out of the folder, to {os.path.realpath(path)}",
                hint="name that file as a source of its own if it is meant",
            )
        else:
            found.append(DataFile(path, os.path.relpath(path, folder), kind))
    if not found:
        names = ", ".join(others[:6]) or "nothing"
        raise DataError(
            f"{source}: no file of a known kind in this folder (found: {names})",
            hint=f"known kinds: {' '.join(SUFFIXES)}",
        )
    return found


def _escapes(path: str, folder: str) -> bool:
    """Outside of `folder`; the hub's cache links from snapshots/<commit>/ into its own blobs/."""
    real, home = Path(path).resolve(), Path(folder).resolve()
    blobs = [up.parent / "blobs" for up in (home, *home.parents) if up.name == "snapshots"]
    return not any(real.is_relative_to(place) for place in (home, *blobs))


def left_aside(source: str, folders: Sequence[Path] = ()) -> list[str]:
    """Files in the folder `source` that are of no kind that is read, and no README or license."""
    place = next((p for p in _places(source, folders) if os.path.isdir(p)), None)
    names = (os.path.relpath(path, place) for path in _walk(place)) if place else ()
    return [n for n in names if not kind_of(n) and not ABOUT_DATA.match(os.path.basename(n))]


def _glob_files(pattern: str) -> list[DataFile]:
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):  # it may be called `data [v2]`
        pattern = os.path.join(glob.escape(folder), name)
    paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    return [DataFile(p, os.path.basename(p), kind) for p in paths if (kind := kind_of(p))]


def _hub_data(source: str) -> HubData | None:
    repo, *rest = re.split(r":(?![^\[]*\])", source)  # the colon of a slice, [:100], is none
    if not _HUB.fullmatch(repo) or len(rest) > 2 or kind_of(repo):
        return None
    if len(rest) == 2:
        return HubData(repo, rest[0] or None, rest[1] or None)
    return HubData(repo, None, rest[0] if rest else None)


def _nothing_there(source: str, places: Sequence[str]) -> DataError:
    near: list[str] = []
    for place in places:
        parent, name = os.path.split(place)
        if os.path.isdir(parent or "."):
            near += difflib.get_close_matches(name, os.listdir(parent or "."), n=2, cutoff=0.6)
    looked = " and ".join(os.path.dirname(place) or "." for place in places)
    if places and places[0].startswith("/content/drive"):
        near = ["from google.colab import drive; drive.mount('/content/drive')"]
    hint = (
        f"did you mean {' or '.join(dict.fromkeys(near))}?"
        if near
        else "give a file, a folder, a glob, `demo` or a hub dataset id such as user/name"
    )
    return DataError(f"{source or '(empty)'}: no such file or folder (looked in {looked})", hint)
