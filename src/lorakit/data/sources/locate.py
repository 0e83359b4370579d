"""Resolve a source string of a recipe to files, an address or a hub dataset.

A source is `demo`, a file, a folder, a glob, an address (https://, s3://, ... through fsspec) or a
hub dataset `user/name[:config][:split]`. A path that exists on this disk takes precedence over the
hub.
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

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
PACKAGED = {"demo": "demo_train.jsonl", "demo:heldout": "demo_heldout.jsonl"}
# Files in a folder that describe the data and are not part of it.
ABOUT_DATA = re.compile(r"(readme|license|licence|changelog)\b.*", re.IGNORECASE)
# Files that tools write next to data: LLaMA-Factory, Kaggle, `save_to_disk` and its cache.
_WRITTEN_BY_TOOLS = re.compile(
    r"(dataset_infos?|dataset_dict|state|sample_submission|package|config)\.(json|csv)$|cache-.*",
    re.IGNORECASE,
)
# Splits by name, as `datasets` finds them: a word of the file's or the folder's name.
_SPLITS = {
    "train": r"train|training",
    "validation": r"validation|valid|val|dev",
    "test": r"test|testing|eval|evaluation|holdout|heldout",
}
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file to read: its path or address, its short name for messages, and its kind (a suffix).

    The kind is "" if only the server knows it. `copy` is the path of a fetched address.
    """

    path: str
    name: str
    kind: str
    copy: str = ""

    @property
    def typed(self) -> str:
        """The file quoted for a shell, valid in any folder."""
        return shlex.quote(self.name if self.remote else self.path)

    def rewritten_by(self, command: str) -> str:
        """A shell command that runs `command` on the file and writes a new one, never the same."""
        return f"{command} {self.typed} > {shlex.quote(Path(self.name).stem + '_fixed.jsonl')}"

    @property
    def remote(self) -> bool:
        """True for an address, False for a path."""
        return "://" in self.path


@dataclass(frozen=True, slots=True)
class HubData:
    """A dataset on the hub; None is the default config, or the split `train`."""

    repo: str
    config: str | None = None
    split: str | None = None


def locate(source: str, folders: Sequence[Path] = ()) -> list[DataFile] | HubData:
    """Resolve `source`; relative paths are tried here, then in each of `folders`.

    Raises:
        DataError: the source does not exist, or a folder has no file of a known kind.
    """
    if source in PACKAGED:
        path = str(files("lorakit") / "assets" / PACKAGED[source])
        return [DataFile(path, source, ".jsonl")]
    if "://" in source:
        check_scheme(source)
        drive = drive_link(source)
        name = "Google Drive file" if drive else source.split("?")[0].rsplit("/", 1)[-1]
        return [DataFile(source, name or source, "" if drive else kind_of(source) or "")]
    paths = _candidate_paths(source, folders)
    for path in paths:
        if os.path.isdir(path):
            return _folder_files(path, source)
        if os.path.exists(path):
            return [DataFile(path, os.path.basename(path), _kind_or_refuse(path))]
    if glob.has_magic(source):
        for path in paths:
            matches = _glob_files(path)
            if matches:
                return matches
    hub = _hub_data(source)
    if hub:
        return hub
    raise _missing(source, paths)


def kind_of(path: str) -> str | None:
    """Suffix that decides how a file is read, without `.gz`; None if unknown."""
    name = path.lower().split("?")[0].removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _candidate_paths(source: str, folders: Sequence[Path]) -> list[str]:
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
    """Paths of all visible files under `folder`, sorted; linked folders are not followed."""
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (os.path.join(parent, n) for n in sorted(names) if not n.startswith("."))


def _folder_files(folder: str, source: str) -> list[DataFile]:
    paths, others = _sorted_out(folder)
    data_files = []
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"{path}: a broken link", hint="remove it or correct its target")
        if _escapes(path, folder):
            raise DataError(
                f"{path}: a link that leads out of the folder, to {os.path.realpath(path)}",
                hint="if it is intended, name that file as a separate source",
            )
        data_files.append(DataFile(path, os.path.relpath(path, folder), kind_of(path) or ""))
    if not data_files:
        names = ", ".join(os.path.basename(path) for path in [*others][:6]) or "nothing"
        raise DataError(
            f"{source}: no file of a known kind in this folder (found: {names})",
            hint=f"known kinds: {' '.join(SUFFIXES)}",
        )
    return data_files


def split_of(path: str) -> str | None:
    """Split that the words of a relative path name, its file name first; None if they do not."""
    for name in reversed(path.replace("\\", "/").split("/")):
        for split, words in _SPLITS.items():
            if re.search(rf"(?<![a-z0-9])({words})(?![a-z])", name, re.IGNORECASE):
                return split
    return None


def _sorted_out(folder: str) -> tuple[list[str], dict[str, str]]:
    """Return the files of a folder to read, and the reason for each of the others."""
    data: list[str] = []
    others: dict[str, str] = {}
    for path in _walk(folder):
        name = os.path.basename(path)
        if ABOUT_DATA.match(name):
            others[path] = ""
        elif kind_of(path) is None or _WRITTEN_BY_TOOLS.match(name):
            others[path] = "file of another kind"
        else:
            data.append(path)
    splits = {path: split_of(os.path.relpath(path, folder)) for path in data}
    held = {path: split for path, split in splits.items() if split in ("validation", "test")}
    if len(held) < len(data):
        others |= {path: f"file of the {split} split" for path, split in held.items()}
        data = [path for path in data if path not in held]
    return data, others


def _escapes(path: str, folder: str) -> bool:
    """True if `path` resolves to a file outside of `folder`.

    The hub's cache may link from snapshots/<commit>/ into its blobs/.
    """
    real, root = Path(path).resolve(), Path(folder).resolve()
    blobs = [up.parent / "blobs" for up in (root, *root.parents) if up.name == "snapshots"]
    return not any(real.is_relative_to(allowed) for allowed in (root, *blobs))


def left_aside(source: str, folders: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """Files in the folder `source` that are not read, each with the reason.

    READMEs and licenses are not listed.
    """
    folder = next((p for p in _candidate_paths(source, folders) if os.path.isdir(p)), None)
    others = _sorted_out(folder)[1] if folder else {}
    return [(os.path.relpath(path, folder), why) for path, why in others.items() if why]


def _glob_files(pattern: str) -> list[DataFile]:
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):  # it may be called `data [v2]`
        pattern = os.path.join(glob.escape(folder), name)
    paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    return [DataFile(p, os.path.basename(p), kind) for p in paths if (kind := kind_of(p))]


def _hub_data(source: str) -> HubData | None:
    repo, *rest = re.split(r":(?![^\[]*\])", source)  # not at the colon of a slice, [:100]
    if not _HUB.fullmatch(repo) or len(rest) > 2 or kind_of(repo):
        return None
    if len(rest) == 2:
        return HubData(repo, rest[0] or None, rest[1] or None)
    return HubData(repo, None, rest[0] if rest else None)


def _missing(source: str, paths: Sequence[str]) -> DataError:
    near: list[str] = []
    for path in paths:
        parent, name = os.path.split(path)
        if os.path.isdir(parent or "."):
            near += difflib.get_close_matches(name, os.listdir(parent or "."), n=2, cutoff=0.6)
    looked = " and ".join(os.path.dirname(path) or "." for path in paths)
    if paths and paths[0].startswith("/content/drive"):
        near = ["from google.colab import drive; drive.mount('/content/drive')"]
    hint = (
        f"did you mean {' or '.join(dict.fromkeys(near))}?"
        if near
        else "give a file, a folder, a glob, `demo` or a hub dataset id such as user/name"
    )
    return DataError(f"{source or '(empty)'}: no such file or folder (looked in {looked})", hint)
