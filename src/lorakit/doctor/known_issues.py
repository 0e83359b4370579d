"""Known issues with their symptom, cause and fix, read from known_issues.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from ruamel.yaml import YAML


@dataclass(frozen=True, slots=True)
class KnownIssue:
    """One issue; `command` fixes it, and `see` names the command that shows it if no check does."""

    symptom: str
    cause: str
    command: str
    see: str | None = None


def _load() -> dict[str, KnownIssue]:
    text = files(__package__).joinpath("known_issues.yaml").read_text("utf-8")
    rows = YAML(typ="safe", pure=True).load(text)
    return {name: KnownIssue(**row) for name, row in rows.items()}


TROUBLES = _load()
