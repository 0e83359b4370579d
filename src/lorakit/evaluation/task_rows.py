"""Values of a task's metrics by row, for one model, and the score of base and tuned together."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorakit.evaluation.model_side import ModelSide
from lorakit.evaluation.paired_interval import aggregate_interval, mean_interval
from lorakit.types import TaskScore


@dataclass(frozen=True, slots=True)
class MetricRows:
    """One metric of one task: its value for each row, and the reason for rows without one.

    `aggregate` makes one number of the values; None is the mean.
    """

    task: str
    metric: str
    values: Mapping[Hashable, Any]
    failures: Mapping[Hashable, str] = field(default_factory=dict)
    higher_is_better: bool = True
    aggregate: Callable[[list[Any]], float] | None = None

    def summary(self) -> float | None:
        """The aggregate of all values; None if there are none."""
        return _summary(list(self.values.values()), self.aggregate) if self.values else None


class EvaluationTask(Protocol):
    """A task of an evaluation; `name` as in results."""

    name: str

    def run(self, side: ModelSide) -> list[MetricRows]:
        """Ask one model and score its answers."""
        ...

    def metric_directions(self) -> dict[str, bool]:
        """Names of the task's metrics, with True where higher is better."""
        ...


def paired_scores(
    base: Sequence[MetricRows], tuned: Sequence[MetricRows], note: Callable[[str], None]
) -> list[TaskScore]:
    """Score base and tuned on the rows that both have a value for.

    Args:
        note: called with a line about rows on which a metric failed.
    """
    before = {(rows.task, rows.metric): rows for rows in base}
    found = []
    for after in tuned:
        rows = before.get((after.task, after.metric))
        if rows is None:
            note(f"{after.task}: {after.metric} gave no value for the base")
            continue
        keys = [key for key in after.values if key in rows.values]
        failures = {**rows.failures, **after.failures}
        if failures:
            place, reason = next(iter(failures.items()))
            total = len(failures.keys() | set(keys))
            note(
                f"{after.task}: {after.metric} failed on {len(failures)} of {total} rows, left out "
                f"for both (first: {place}: {reason})"
            )
        if keys:
            pair = [rows.values[key] for key in keys], [after.values[key] for key in keys]
            found.append(_score(after, *pair, len(failures)))
    return found


def _score(rows: MetricRows, base: list[Any], tuned: list[Any], failed: int) -> TaskScore:
    interval: tuple[float, float] | None
    if rows.aggregate is None:
        differences = [float(b) - float(a) for a, b in zip(base, tuned, strict=True)]
        interval = mean_interval(differences)
    else:
        interval = aggregate_interval(base, tuned, rows.aggregate)
    low, high = interval or (None, None)
    return TaskScore(
        rows.task,
        rows.metric,
        len(base),
        _summary(base, rows.aggregate),
        _summary(tuned, rows.aggregate),
        low,
        high,
        rows.higher_is_better,
        failed,
    )


def _summary(values: list[Any], aggregate: Callable[[list[Any]], float] | None) -> float:
    if aggregate is not None:
        return float(aggregate(values))
    return math.fsum(float(value) for value in values) / len(values)
