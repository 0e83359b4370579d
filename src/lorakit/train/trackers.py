"""A tracker's callback enters; the same leaves, unable to end a run by its own failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Sheltered:
    """Passes every event on to a tracker until it fails once; then says so and goes on without."""

    def __init__(self, tracker: Any, note: Callable[[str], None]) -> None:
        self.tracker, self.note = tracker, note
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.tracker, name)
        if not name.startswith("on_"):
            return found

        def event(*args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return None
            try:
                return found(*args, **kwargs)
            except Exception as error:
                self.failed = True
                kind = type(self.tracker).__name__.removesuffix("Callback").lower()
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                self.note(
                    f"report_to: {kind} failed ({reason}); training goes on without it, "
                    "metrics.jsonl has everything"
                )
                return None

        return event
