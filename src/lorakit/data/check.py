"""Troubles of single rows enter, one by one; counted faults with their first rows leave."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorakit.records import Conversation, Document, Fault, Origin

SHOWN_ROWS = 5
LEFT_OUT = "left out"


@dataclass(slots=True)
class _Entry:
    action: str
    count: int = 0
    rows: list[str] = field(default_factory=list)


class FaultLog:
    """Counts faults by kind and keeps the first rows of each; nothing is dropped without one."""

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}

    def add(self, kind: str, origin: Origin, action: str = LEFT_OUT) -> None:
        """Record one row; `action` says what was done with it."""
        entry = self.entries.setdefault(kind, _Entry(action))
        entry.count += 1
        if len(entry.rows) < SHOWN_ROWS:
            entry.rows.append(str(origin))

    @property
    def left_out(self) -> int:
        """Rows that will not be trained."""
        return sum(e.count for e in self.entries.values() if e.action == LEFT_OUT)

    def faults(self) -> tuple[Fault, ...]:
        """Most frequent first."""
        ordered = sorted(self.entries.items(), key=lambda item: -item[1].count)
        return tuple(Fault(kind, e.count, tuple(e.rows), e.action) for kind, e in ordered)


def content_key(record: Conversation | Document) -> int:
    """Equal for records with the same text, whatever row they stand in."""
    if isinstance(record, Document):
        return hash(record.text)
    return hash(tuple((m.role, m.content) for m in record.messages))
