"""Faults of one file's lines enter; one error that names the first ten and counts the rest leaves.

A file with forty broken lines would else be mended in forty runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType

from lorakit.errors import DataError

SHOWN_FAULTS = 10
SHOWN_HINTS = 3


class Broken:
    """The faults of `name` while it is read in a `with`; its end raises those that were added.

    A DataError that ends the `with` is the last of them: after it the file cannot be read on.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._place = 0
        # Texts, not the errors: one of those holds its whole line, of up to 16 MiB.
        self._told: list[str] = []
        self._hints: dict[str, str] = {}

    def add(self, place: int, fault: Callable[[], DataError]) -> None:
        """Line (or row) `place` is wrong, as `fault` says; only the first fault of a line counts.

        It is asked where it is shown: a message takes 90 us, of which 80 look for secrets.
        """
        if place == self._place:
            return
        self._place = place
        self.count += 1
        if len(self._told) < SHOWN_FAULTS:
            self._tell(fault())

    def _tell(self, fault: DataError) -> None:
        self._told.append(fault.message)
        # The same advice for another line is told once.
        same = re.sub(r"\d+", "", fault.hint or "")
        if same and len(self._hints) < SHOWN_HINTS:
            self._hints.setdefault(same, fault.hint or "")

    def __enter__(self) -> Broken:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.count:
            return
        if isinstance(error, DataError):
            # Told after the ten too: it is what the others are counted up to.
            self.count += 1
            self._tell(error)
        if error is None or isinstance(error, DataError):
            raise self._all() from None

    def _all(self) -> DataError:
        hint = "\n  ".join(self._hints.values())
        if self.count == 1:
            return DataError(self._told[0], hint)
        lines = [f"{self.name}: {self.count:,} faults:", *self._told]
        if self.count > len(self._told):
            lines.insert(SHOWN_FAULTS + 1, f"and {self.count - len(self._told):,} more")
        return DataError("\n  ".join(lines), hint)
