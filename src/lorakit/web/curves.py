"""Read metrics.jsonl as it grows, and reduce long curves to what a screen can show."""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST = 1e100
# Names of the curves in metrics.jsonl, those of held-out losses last.
KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb", "eval_loss")
POINTS = 1000
Curve = tuple[list[float], list[float | None]]


@dataclass
class Metrics:
    """Columns of one metrics.jsonl; `update` reads only the lines that are new."""

    path: Path
    steps: dict[str, array[float]] = field(default_factory=dict)
    values: dict[str, array[float]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    version: int = 0  # of the file: a resume writes it again
    _offset: int = 0
    _file: int = 0

    def update(self) -> bool:
        """Read new complete lines; return True if there were any, or if the file was replaced."""
        try:
            handle = self.path.open("rb")
        except OSError:
            return False
        with handle:
            found = os.fstat(handle.fileno())
            replaced = found.st_ino != self._file or found.st_size < self._offset
            if replaced:
                self.steps, self.values, self.last, self.rows = {}, {}, {}, []
                self.version += self._file != 0
                self._offset, self._file = 0, found.st_ino
            if found.st_size == self._offset:
                return replaced
            handle.seek(self._offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            self._add(line)
        return replaced or end > 0

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step < 2**53:
            return
        if "eval_loss" not in row:
            self.last = row
            if row.get("skipped") or row.get("spike"):
                self.rows.append(row)
        for key in KEYS:
            if key in row:
                self.steps.setdefault(key, array("d")).append(step)
                self.values.setdefault(key, array("d")).append(_number(row[key]))

    def since(self, known: dict[str, int], points: int = POINTS) -> dict[str, Curve]:
        """Curves of the rows after the first `known[key]` of each key, in at most `points`."""
        found = {}
        for key, xs in self.steps.items():
            begin = known.get(key, 0)
            if begin < len(xs):
                found[key] = reduced(xs[begin:], self.values[key][begin:], points)
        return found

    def counts(self) -> dict[str, int]:
        """Rows of each key so far."""
        return {key: len(xs) for key, xs in self.steps.items()}


def reduced(xs: array[float], ys: array[float], points: int = POINTS) -> Curve:
    """Keep the lowest and highest value of each of `points / 2` equal parts, and both ends.

    Peaks survive, unlike in means. NaN becomes None, a gap in the curve.
    """
    count = len(xs)
    if count <= points:
        chosen = range(count)
    else:
        kept = {0, count - 1}
        parts = max(1, points // 2 - 1)
        for part in range(parts):
            begin, end = part * count // parts, (part + 1) * count // parts
            real = [i for i in range(begin, end) if ys[i] == ys[i]]
            kept |= (
                {min(real, key=ys.__getitem__), max(real, key=ys.__getitem__)} if real else {begin}
            )
        chosen = sorted(kept)  # type: ignore[assignment]
    return [xs[i] for i in chosen], [_rounded(ys[i]) for i in chosen]


def _number(value: Any) -> float:
    real = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    return float(value) if real else float("nan")


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if value == value else None
