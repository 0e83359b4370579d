"""Read metrics.jsonl as it grows, and reduce long curves to the points that a screen can show."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.display.charts import thinned
from lorakit.report.load_run import finite

# Keys of metrics.jsonl that become curves, that of the held-out losses last.
KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb", "eval_loss")


def _columns() -> dict[str, tuple[array[float], array[float]]]:
    return {key: (array("d"), array("d")) for key in KEYS}


@dataclass
class Metrics:
    """Steps and values of each key of one metrics.jsonl; `update` reads only the new lines."""

    path: Path
    columns: dict[str, tuple[array[float], array[float]]] = field(default_factory=_columns)
    marks: dict[int, dict[str, Any]] = field(default_factory=dict)  # skipped steps and spikes
    rows: int = 0
    _offset: int = 0
    _file: int = 0

    def update(self) -> None:
        """Read new complete lines; a file that a resume wrote again is read from its start."""
        try:
            handle = self.path.open("rb")
        except OSError:
            return
        with handle:
            found = os.fstat(handle.fileno())
            if found.st_ino != self._file or found.st_size < self._offset:
                self.columns, self.marks = _columns(), {}
                self._offset, self._file = 0, found.st_ino
            handle.seek(self._offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step < 2**53:
            return
        self.rows += 1
        if row.get("skipped") or row.get("spike"):
            self.marks[step] = {key: bool(row.get(key)) for key in ("skipped", "spike")}
        for key in KEYS:
            if key in row:
                value = finite(row[key])
                self.columns[key][0].append(step)
                self.columns[key][1].append(np.nan if value is None else value)

    def curves(self, points: int) -> dict[str, tuple[list[float], list[float | None]]]:
        """Steps and values of each curve, in at most `points`; its peaks are kept, NaN is None."""
        found = {}
        for key, (steps, values) in self.columns.items():
            if steps:
                x, y = thinned(np.array(steps), np.array(values), points)
                found[key] = x.tolist(), [float(f"{v:.6g}") if v == v else None for v in y]
        return found

    def steps(self, most: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows of the steps, or of `most` evenly spaced ones, with the values that all have."""
        steps = self.columns["loss"][0]
        columns = {k: ys for k, (xs, ys) in self.columns.items() if xs == steps}
        chosen: Iterable[int] = range(len(steps))
        if most is not None and len(steps) > most:
            chosen = (round(i * (len(steps) - 1) / (most - 1)) for i in range(most))
        for i in chosen:
            row = {key: None if (y := ys[i]) != y else y for key, ys in columns.items()}
            yield {"step": int(steps[i]), **row, **self.marks.get(int(steps[i]), {})}

    def held_out(self) -> list[dict[str, Any]]:
        """Rows of the held-out losses."""
        pairs = zip(*self.columns["eval_loss"], strict=True)
        return [{"step": int(step), "eval_loss": loss} for step, loss in pairs if loss == loss]

    def peak(self, key: str) -> float | None:
        """Largest value of a curve."""
        return max((value for value in self.columns[key][1] if value == value), default=None)
