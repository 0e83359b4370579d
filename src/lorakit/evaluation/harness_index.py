"""Find lm-eval's task files by name without parsing all of them.

lm-eval parses its 14,000 task files for each index, which takes half a minute. Here their text is
searched for names, in a second, and only the folders that hold the wanted tasks are indexed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

# A key with one name, with names in brackets, or with a list of names below it.
_NAMED = re.compile(
    r"^[\"']?(?:task|group|tag)[\"']?:[ \t]*"
    r"(?:\[([^\]]*)\]|([^\s#\[].*)|\n((?:[ \t]*-[ \t]+\S.*\n?)+))",
    re.MULTILINE,
)


def names_in(text: str) -> list[str]:
    """Names of tasks, groups and tags in the text of a task file."""
    found = []
    for inline, single, listed in _NAMED.findall(text):
        if single:
            parts = [single.split(" #")[0]]
        elif inline:
            parts = inline.split(",")
        else:
            parts = [line.strip().removeprefix("-") for line in listed.splitlines()]
        found += [part.strip().strip("'\"") for part in parts]
    return [name for name in found if name]


def task_folders(root: Path) -> dict[str, set[Path]]:
    """Folders directly under `root` whose task files have a name, by name."""
    found: dict[str, set[Path]] = {}
    for path in _files(root):
        text = path.read_text(encoding="utf-8", errors="replace")
        top = path.relative_to(root).parts[0]
        for name in names_in(text):
            found.setdefault(name, set()).add(root / top)
    return found


def mentioned(folders: Sequence[Path]) -> set[str]:
    """Names in the task files of a user's folders, which may be tasks of lm-eval."""
    texts = (p.read_text(encoding="utf-8", errors="replace") for f in folders for p in _files(f))
    return {name for text in texts for name in names_in(text)}


def _files(folder: Path) -> Iterator[Path]:
    """Task files, and the parts that they include, which have no suffix."""
    for path in folder.rglob("*"):
        if path.suffix in ("", ".yaml", ".yml") and path.is_file():
            yield path
