"""Conversations and faults of single rows enter; usable conversations and counted Faults leave.

Damage to a file's structure (a broken line) stops the run. A row that is whole but cannot be used
(no answer, roles out of order) is left out, and counted here with its place: never silently.
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
# What was asked for and is only told: no fault of the data, so none for `strict: true`.
HELD_OUT = "scored, not trained on; val_data, val_size or smaller files change it"
INFO_ONLY = ("its end is held out", "not drawn", HELD_OUT)


class RowError(DataError):
    """One row that cannot be used: it is left out and counted under `kind`, and the run goes on."""

    def __init__(self, kind: str, origin: Origin, detail: str, hint: str | None = None) -> None:
        super().__init__(f"{origin}: {detail}", hint)
        self.kind = kind
        self.origin = origin


class FatalRowError(RowError):
    """One row on which training would go wrong: a run stops at it, `inspect` counts on."""

    exit_code = 1


class IssueLog:
    """Counts faults by kind and action while rows stream by; keeps the first rows of each."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[int, list[str]]] = {}
        self._spoiling: set[str] = set()
        self.rows_left_out = 0
        self.first_left_out: RowError | None = None

    def add(self, kind: str, origin: Origin | str, action: str) -> None:
        """One more case of `kind`, at `origin`, and what was done about it."""
        count, rows = self._seen.get((kind, action), (0, []))
        if len(rows) < SHOWN_ROWS and str(origin) not in rows:
            rows.append(str(origin))
        self._seen[kind, action] = (count + 1, rows)

    def add_many(self, kind: str, count: int, rows: Sequence[str], action: str) -> None:
        """`count` more cases of `kind`, the first of them at `rows`."""
        had, own = self._seen.get((kind, action), (0, []))
        self._seen[kind, action] = (had + count, [*own, *rows][:SHOWN_ROWS])

    def leave_out(self, fault: RowError) -> None:
        """The row of `fault` is not used."""
        self.rows_left_out += 1
        self.first_left_out = self.first_left_out or fault
        if isinstance(fault, FatalRowError):
            self._spoiling.add(fault.kind)
        self.add(fault.kind, fault.origin, LEFT_OUT)

    def absorb(self, other: IssueLog) -> None:
        """Add all that `other` counted."""
        for (kind, action), (count, rows) in other._seen.items():
            self.add_many(kind, count, rows, action)
        self._spoiling |= other._spoiling
        self.rows_left_out += other.rows_left_out
        self.first_left_out = self.first_left_out or other.first_left_out

    @property
    def spoils(self) -> bool:
        """Some row would spoil a run."""
        return bool(self._spoiling)

    def as_dict(self) -> dict[str, Any]:
        """All that was counted, as JSON values; `from_dict` takes it back."""
        seen = [[*key, *value] for key, value in self._seen.items()]
        return {"seen": seen, "left_out": self.rows_left_out, "spoiling": sorted(self._spoiling)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IssueLog:
        """The log that `as_dict` told of."""
        log = cls()
        log._seen = {(kind, action): (count, rows) for kind, action, count, rows in values["seen"]}
        log.rows_left_out, log._spoiling = values["left_out"], set(values["spoiling"])
        return log

    def faults(self) -> tuple[Fault, ...]:
        """All kinds seen, most frequent first."""
        found = [
            Fault(kind, count, tuple(rows), action, kind in self._spoiling)
            for (kind, action), (count, rows) in self._seen.items()
        ]
        return tuple(sorted(found, key=lambda fault: -fault.count))


# Which turns may follow which; "call" is an assistant turn that calls tools.
_FOLLOWS = {
    "start": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}


def check_turns(conversation: Conversation, log: IssueLog) -> Conversation:
    """The conversation, fit to be trained on: [system] (user (call tool+)* assistant)+.

    What comes after the last assistant turn is taken off and reported.

    Raises:
        RowFault: no answer at all, or turns out of order.
    """
    origin, messages = conversation.origin, conversation.messages
    if not any(m.role == "assistant" for m in messages):
        raise RowError("no answer", origin, "there is no assistant turn to learn from")
    before = "start"
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, turn in enumerate(turns, 1):
        kind = "call" if _calls(turn) else turn.role
        # Hermes writes its calls as text: what follows may be a result all the same.
        loose = (before, kind) == ("assistant", "tool") and "<tool_call>" in turns[
            number - 2
        ].content
        if kind not in _FOLLOWS[before] and not loose:
            fault = _disorder(before, turn)
            expected = " or ".join(dict.fromkeys(_SPOKEN.get(k, k) for k in _FOLLOWS[before]))
            detail = f"{fault}: turn {number} is of {turn.role}, expected {expected}"
            raise RowError(fault, origin, detail)
        before = kind
    if turns[-1].role != "assistant":
        kept = len(messages)
        while messages[kept - 1].role != "assistant":
            kept -= 1
        what = "question" if turns[-1].role == "user" else "tool result"
        log.add(f"last {what} without answer", origin, f"the {what} was taken off")
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
    """Content hash of 64 bits, the same for equal content wherever it stands.

    In a million rows two different ones meet with a chance of 3 in 100 million.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(item, Document):
        digest.update(item.text.encode())
    else:
        for message in item.messages:
            # Lengths keep "a"+"bc" apart from "ab"+"c".
            extra = json.dumps(message.extra, sort_keys=True) if message.extra else ""
            content = (message.content + extra).encode()
            digest.update(f"{message.role} {len(content)} ".encode() + content)
    return int.from_bytes(digest.digest(), "little")


def refuse_if_empty(kept: int, read: int, source: str, log: IssueLog) -> None:
    """Stop when no row of `source` can be used.

    Raises:
        SpoilsRun: they would spoil a run.
        DataError: names the commonest faults and the first row of each.
    """
    if kept:
        return
    if isinstance(log.first_left_out, FatalRowError):
        raise log.first_left_out
    if not read:
        raise DataError(f"{source}: there are no rows in it", hint="is it the right file?")
    hint = log.first_left_out.hint if log.first_left_out else None
    raise DataError(f"{source}: none of its {read} rows can be used: {told_faults(log)}", hint)


def told_faults(log: IssueLog) -> str:
    """The three commonest reasons for which rows were left out, and the first in full."""
    lost = [fault for fault in log.faults() if fault.action == LEFT_OUT][:3]
    reasons = "; ".join(f"{f.count} x {f.kind} ({', '.join(f.first_rows[:2])})" for f in lost)
    return f"{reasons}; first: {log.first_left_out.message}" if log.first_left_out else reasons


def refuse_if_strict(log: IssueLog) -> None:
    """Stop at any fault of the data (`strict: true`).

    Raises:
        DataError: lists every kind of fault with its count and first rows.
    """
    faults = [fault for fault in log.faults() if fault.action not in INFO_ONLY]
    if not faults:
        return
    lines = [f"  {f.count} x {f.kind} ({', '.join(f.first_rows)})" for f in faults]
    raise DataError(
        "strict: the data has faults:\n" + "\n".join(lines),
        hint="mend these rows, or set strict: false, which does with each what data_report.json "
        "of such a run says",
    )
