"""An imported recipe enters; its YAML text, and the account of every key on a screen, leave."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from lorakit.recipe_import.translate import Imported


def recipe_text(found: Imported) -> str:
    """The recipe as YAML: each value with the key it came from; what was left at the end."""
    lines = [f"# From {_one_line(found.source)} ({found.tool}), by `lorakit import`."]
    for key, value in found.values.items():
        origin = _one_line(found.origins.get(key, "lorakit"))
        told = "" if origin == key else f"  # {origin}"
        lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}{told}")
    if found.left:
        lines.append("# Not translated; these will be otherwise than there:")
        lines += [f"#   {_one_line(line.key)}: {_one_line(line.note)}" for line in found.left]
    return "\n".join(lines) + "\n"


def show_import(found: Imported, console: Console, place: str | None) -> None:
    """What became of each key: taken, lorakit's own, not translated."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(f"{found.source}: a recipe of {found.tool}, {len(found.lines)} keys")
    say("\ntaken")
    for line in found.lines:
        if line.status == "taken":
            say(f"  {line.key} -> {line.here}{f'  ({line.note})' if line.note else ''}")
    written = [k for k, origin in found.origins.items() if origin.endswith("'s default")]
    if written:
        pairs = ", ".join(f"{key}: {found.values[key]}" for key in written)
        say(f"  not written there, so its defaults -> {pairs}")
    say("\nneedless here, or lorakit's own doing")
    for note, keys in _by_note(found, "own").items():
        say(f"  {', '.join(keys)}: {note}")
    if found.left:
        say("\nNOT translated: these will be otherwise than there")
        for line in found.left:
            say(f"  {line.key}: {line.note}")
    count = len(found.left)
    end = f"{count} key{'' if count == 1 else 's'} not translated" if count else "all translated"
    say(
        f"\n{end}"
        + (f"; written to {place}. Look: lorakit train {place} --dry-run" if place else "")
    )


def as_dict(found: Imported) -> dict[str, Any]:
    """For JSON."""
    return {
        "tool": found.tool,
        "recipe": dict(found.values),
        "keys": [line.as_dict() for line in found.lines],
        "not_translated": len(found.left),
    }


def _by_note(found: Imported, status: str) -> dict[str, list[str]]:
    """Keys of one fate share a line."""
    groups: dict[str, list[str]] = {}
    for line in found.lines:
        if line.status == status:
            groups.setdefault(line.note or "-", []).append(line.key)
    return groups


def _one_line(text: str) -> str:
    """Without line ends, which would end a comment."""
    return " ".join(text.split())
