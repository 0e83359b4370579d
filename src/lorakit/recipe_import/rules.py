"""One key of another tool and its value enter; our keys, or why there are none, leave.

A tool's table is a dict of its keys to rules made by the functions below. Three things can become
of a key: it is `taken`; it is `own`, since lorakit does it by itself or it has no effect on what is
trained; or it is `left`, and then the run will differ, and the note says how and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["taken", "own", "left"]


@dataclass(frozen=True, slots=True)
class Said:
    """What becomes of one value: our keys with their values, and a note where it needs one."""

    status: Status
    values: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(slots=True)
class Draft:
    """The file being read and the recipe that grows from it. `folder` is where the file lies."""

    source: dict[str, Any]
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, Said]] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)

    def on(self, key: str) -> bool:
        """A switch of the source that is set to anything but off."""
        return is_on(self.source.get(key))

    def say(self, key: str, said: Said) -> None:
        """Take the values and keep the word on `key`."""
        self.values |= said.values
        self.origins |= dict.fromkeys(said.values, key)
        self.lines.append((key, said))

    def leave(self, key: str, note: str) -> None:
        """It will be otherwise than there."""
        self.say(key, Said("left", note=note))


@dataclass(frozen=True, slots=True)
class Rule:
    """`here` names our keys and `note` says how, for the documentation; `read` does it."""

    status: Status
    here: str
    note: str
    read: Callable[[Any, Draft], Said]


@dataclass(frozen=True, slots=True)
class Tool:
    """Another tool: its keys, and what it does where a key is not written.

    `defaults` are in our words: the tool's own value, or a function of the draft. `begin` looks at
    the whole file first: it raises where that is no training which lorakit does.
    """

    name: str
    keys: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    begin: Callable[[Draft], None]


class Unfit(Exception):
    """This value has no match here; the text says why and what to do."""


def is_off(value: Any) -> bool:
    """Empty, null, no or 0: as if the key were not there."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "false", "no", "off", "none", "null")
    return not value


def is_on(value: Any) -> bool:
    """Not off."""
    return not is_off(value)


# -- values ---------------------------------------------------------------------------------------


def whole(value: Any) -> int:
    """A whole number, also where it is written as text or as 8.0.

    Raises:
        Unfit: it is none.
    """
    found = number(value)
    if found != int(found):
        raise Unfit(f"{_shown(value)} is no whole number")
    return int(found)


def number(value: Any) -> float:
    """A number, also where it is written as text: YAML 1.1 reads 1e-4 as one.

    Raises:
        Unfit: it is none.
    """
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            found = float(value)
        except ValueError:
            found = float("nan")
        if abs(found) < 1e30:
            return found
    raise Unfit(f"{_shown(value)} is no number")


def figure(value: Any) -> int | float:
    """A number, whole where it is.

    Raises:
        Unfit: it is none.
    """
    found = number(value)
    return int(found) if found == int(found) else found


def words(value: Any) -> list[str]:
    """A list of names, also where it is written as one text with commas.

    Raises:
        Unfit: it is neither.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        raise Unfit(f"{_shown(value)} is no list of names")
    return [p.strip() for p in parts if p.strip()]


def text(value: Any) -> str:
    """A text.

    Raises:
        Unfit: it is none.
    """
    if not isinstance(value, str):
        raise Unfit(f"{_shown(value)} is no text")
    return value


def held_out(value: Any) -> float | int:
    """Share or number of held-out rows; 0 is none.

    Raises:
        Unfit: it is no number.
    """
    found = number(value)
    return found if 0 < found < 1 else whole(value)


def hub_id(repo: Any, config: Any, split: Any) -> str:
    """A data set of the hub as `data` names it: repo, repo:split or repo:config:split."""
    if config:
        return f"{repo}:{config}:{split or 'train'}"
    return f"{repo}:{split}" if split and split != "train" else str(repo)


# -- rules ----------------------------------------------------------------------------------------


def same(here: str, convert: Callable[[Any], Any] = text, note: str = "") -> Rule:
    """The same setting under our name."""

    def read(value: Any, draft: Draft) -> Said:
        return Said("taken", {here: convert(value)}, note)

    return Rule("taken", f"`{here}`", note, read)


def choice(here: str, table: Mapping[Any, Any], otherwise: str) -> Rule:
    """One of a few values, each with its match; another is left, with `otherwise` as the reason."""

    def read(value: Any, draft: Draft) -> Said:
        known = value if isinstance(value, bool) else str(value).lower()
        if known not in table:
            raise Unfit(f"{_shown(value)}: {otherwise}")
        return Said("taken", {here: table[known]})

    ours: dict[Any, list[str]] = {}
    for theirs, value in table.items():
        if str(theirs) != str(value):
            ours.setdefault(value, []).append(str(theirs))
    told = [f"{', '.join(theirs)} → {value}" for value, theirs in ours.items()]
    return Rule("taken", f"`{here}`", "; ".join([*told, f"others: {otherwise}"]), read)


def switch(here: str, note: str = "") -> Rule:
    """On or off, under our name."""

    def read(value: Any, draft: Draft) -> Said:
        return Said("taken", {here: is_on(value)}, note)

    return Rule("taken", f"`{here}`", note, read)


def own(note: str) -> Rule:
    """lorakit does this itself, or it has no effect on what is trained."""
    return Rule("own", "", note, lambda value, draft: Said("own", note=note))


def left(reason: str, *unless: Any) -> Rule:
    """Not translated, unless it is switched off or has a value that holds here, `unless`."""

    def read(value: Any, draft: Draft) -> Said:
        if is_off(value) or value in unless:
            return Said("own", note="off there, as here" if is_off(value) else "as here")
        return Said("left", note=reason)

    return Rule("left", "", reason, read)


def by(here: str, note: str, read: Callable[[Any, Draft], Said]) -> Rule:
    """A rule with a function of its own, which may look at the other keys."""
    return Rule("taken", here, note, read)


def _shown(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
