"""Check the turns of conversations, and count the rows that cannot be used.

Damage to the structure of a file (a broken line) stops the run. A row that parses but cannot be
used (no answer, roles out of order) is left out, and counted here with its origin, never silently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.errors import DataError
from lorakit.types import Conversation, Document, Fault, Message, Origin

SHOWN_ROWS = 5
LEFT_OUT = "left out"
# Kinds of rows that occur twice, see `data/dedup.py`.
EXACT_DUPLICATE, NEAR_DUPLICATE = "exact duplicate", "near duplicate"
OVERLAP = "held-out row is also in the training data"
OVERLAP_NEAR = "held-out row is nearly one of the training data"
# Actions that follow from the recipe and are only reported: not faults for `strict: true`.
HELD_OUT = "scored, not trained on; val_data, val_size or smaller files change it"
INFO_ONLY = ("its end is held out", "not drawn", HELD_OUT)


class RowError(DataError):
    """One row that cannot be used; it is left out, counted under `kind`, and the run continues."""

    def __init__(self, kind: str, origin: Origin, detail: str, hint: str | None = None) -> None:
        super().__init__(f"{origin}: {detail}", hint)
        self.kind = kind
        self.origin = origin


class FatalRowError(RowError):
    """One row that would spoil the training; a run stops at it, `inspect` keeps counting."""

    exit_code = 1


class IssueLog:
    """Counts faults by kind and action, with the first rows of each."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[int, list[str]]] = {}
        self._spoiling: set[str] = set()
        self.rows_left_out = 0
        self.first_left_out: RowError | None = None

    def add(self, kind: str, origin: Origin | str, action: str) -> None:
        """Count one case of `kind` at `origin`, with the action taken."""
        count, rows = self._seen.get((kind, action), (0, []))
        if len(rows) < SHOWN_ROWS and str(origin) not in rows:
            rows.append(str(origin))
        self._seen[kind, action] = (count + 1, rows)

    def add_many(self, kind: str, count: int, rows: Sequence[str], action: str) -> None:
        """Count `count` cases of `kind`, the first of them at `rows`."""
        seen, first_rows = self._seen.get((kind, action), (0, []))
        self._seen[kind, action] = (seen + count, [*first_rows, *rows][:SHOWN_ROWS])

    def skip_row(self, fault: RowError) -> None:
        """Count the row of `fault` as left out."""
        self.rows_left_out += 1
        self.first_left_out = self.first_left_out or fault
        if isinstance(fault, FatalRowError):
            self._spoiling.add(fault.kind)
        self.add(fault.kind, fault.origin, LEFT_OUT)

    def merge(self, other: IssueLog) -> None:
        """Add the counts of `other`."""
        for (kind, action), (count, rows) in other._seen.items():
            self.add_many(kind, count, rows, action)
        self._spoiling |= other._spoiling
        self.rows_left_out += other.rows_left_out
        self.first_left_out = self.first_left_out or other.first_left_out

    @property
    def spoils(self) -> bool:
        """True if at least one row would spoil a run."""
        return bool(self._spoiling)

    def as_dict(self) -> dict[str, Any]:
        """All counts as JSON values, for `from_dict`."""
        seen = [[*key, *value] for key, value in self._seen.items()]
        return {"seen": seen, "left_out": self.rows_left_out, "spoiling": sorted(self._spoiling)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IssueLog:
        """Restore a log from the result of `as_dict`."""
        log = cls()
        log._seen = {(kind, action): (count, rows) for kind, action, count, rows in values["seen"]}
        log.rows_left_out, log._spoiling = values["left_out"], set(values["spoiling"])
        return log

    def faults(self) -> tuple[Fault, ...]:
        """All faults, most frequent first."""
        faults = [
            Fault(kind, count, tuple(rows), action, kind in self._spoiling)
            for (kind, action), (count, rows) in self._seen.items()
        ]
        return tuple(sorted(faults, key=lambda fault: -fault.count))


# Turns that may follow each turn; "call" is an assistant turn that calls tools.
_FOLLOWS = {
    "start": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}


def check_turns(conversation: Conversation, log: IssueLog) -> Conversation:
    """Check the order of turns, [system] (user (call tool+)* assistant)+, and cut the end.

    Turns after the last assistant turn are removed and reported.

    Raises:
        RowError: there is no answer, or turns are out of order.
    """
    origin, messages = conversation.origin, conversation.messages
    if not any(m.role == "assistant" for m in messages):
        raise RowError("no answer", origin, "there is no assistant turn to learn from")
    before = "start"
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, turn in enumerate(turns, 1):
        step = "call" if _calls(turn) else turn.role
        # Hermes writes its calls as text, so that a result may follow a plain answer.
        loose = (before, step) == ("assistant", "tool") and "<tool_call>" in turns[
            number - 2
        ].content
        if step not in _FOLLOWS[before] and not loose:
            fault = _disorder(before, turn)
            expected = " or ".join(dict.fromkeys(_SPOKEN.get(k, k) for k in _FOLLOWS[before]))
            detail = f"{fault}: turn {number} is of {turn.role}, expected {expected}"
            raise RowError(fault, origin, detail)
        before = step
    if turns[-1].role != "assistant":
        kept = len(messages)
        while messages[kept - 1].role != "assistant":
            kept -= 1
        noun = "question" if turns[-1].role == "user" else "tool result"
        log.add(f"last {noun} without answer", origin, f"the {noun} was taken off")
        return replace(conversation, messages=messages[:kept])
    return conversation


_SPOKEN = {"call": "assistant"}


def _calls(turn: Message) -> bool:
    return turn.role == "assistant" and bool(turn.extra.get("tool_calls"))


def _disorder(before: str, turn: Message) -> str:
    if turn.role == "system":
        return "system turn that is not the first"
    if before == "call":
        return "tool call without result"
    if turn.role == "tool":
        return "tool result without call"
    if turn.role == before:
        return f"two {turn.role} turns in a row"
    return "roles out of order"


def content_hash(item: Conversation | Document) -> int:
    """64-bit hash of the content of an item, without its origin.

    In a million different rows the probability of a collision is 3 in 100 million.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(item, Document):
        digest.update(item.text.encode())
    else:
        if item.good is not None:
            digest.update(f"label {item.good} ".encode())
        for number, message in enumerate((*item.messages, *item.rejected)):
            if number == len(item.messages):
                digest.update(b"rejected ")
            # Lengths keep "a"+"bc" apart from "ab"+"c".
            extra = json.dumps(message.extra, sort_keys=True) if message.extra else ""
            content = (message.content + extra).encode()
            digest.update(f"{message.role} {len(content)} ".encode() + content)
    return int.from_bytes(digest.digest(), "little")


def refuse_if_empty(kept: int, read: int, source: str, log: IssueLog) -> None:
    """Raise if no row of `source` can be used.

    Raises:
        FatalRowError: the first row left out would spoil a run.
        DataError: no row can be used; names the commonest faults and the first rows of each.
    """
    if kept:
        return
    if isinstance(log.first_left_out, FatalRowError):
        raise log.first_left_out
    if not read:
        raise DataError(
            f"{source}: there are no rows in it", hint="check that it is the right file"
        )
    hint = log.first_left_out.hint if log.first_left_out else None
    raise DataError(f"{source}: none of its {read} rows can be used: {summarize_faults(log)}", hint)


def summarize_faults(log: IssueLog) -> str:
    """Summarize the three commonest reasons for left-out rows, and the first one in full."""
    lost = [fault for fault in log.faults() if fault.action == LEFT_OUT][:3]
    reasons = "; ".join(f"{f.count} x {f.kind} ({', '.join(f.first_rows[:2])})" for f in lost)
    return f"{reasons}; first: {log.first_left_out.message}" if log.first_left_out else reasons


def refuse_if_strict(log: IssueLog) -> None:
    """Raise at any fault of the data (`strict: true`).

    Raises:
        DataError: there are faults; lists each kind with its count and first rows.
    """
    faults = [fault for fault in log.faults() if fault.action not in INFO_ONLY]
    if not faults:
        return
    lines = [f"  {f.count} x {f.kind} ({', '.join(f.first_rows)})" for f in faults]
    raise DataError(
        "strict: the data has faults:\n" + "\n".join(lines),
        hint="correct these rows, or set strict: false; data_report.json then lists what "
        "was done with each",
    )
