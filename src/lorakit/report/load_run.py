"""Read the record of a run from its folder; all files except the recipe may be missing.

A stopped run has no evaluation, an old one no lengths, a diverged one rows without a loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lorakit.errors import RunError
from lorakit.recipe.loader import read_resolved
from lorakit.recipe.schema import Recipe
from lorakit.storage.best_record import BestStep, best_step
from lorakit.storage.run_dir import RunDir, read_lines, read_metrics

ReportRow = dict[str, Any]
LARGEST = 1e100  # an axis of matplotlib overflows near 1e308
PATHS = ("model", "from_adapter", "data", "val_data", "output_dir", "reward_funcs")


@dataclass(frozen=True, slots=True)
class Record:
    """One run; missing files are empty, and `shown` is the recipe without local paths."""

    name: str
    recipe: Recipe
    shown: dict[str, Any]
    origins: dict[str, str]
    data: dict[str, Any]
    plan: dict[str, Any]
    environment: dict[str, Any]
    steps: tuple[ReportRow, ...]
    held: tuple[ReportRow, ...]
    evaluation: dict[str, Any] | None
    exports: dict[str, dict[str, Any]]
    finished: bool
    best: BestStep | None = None
    start: dict[str, Any] = field(default_factory=dict)
    stopped: dict[str, Any] = field(default_factory=dict)
    rollouts: tuple[ReportRow, ...] = ()

    def column(self, key: str) -> list[tuple[float, float | None]]:
        """(step, value) of each row that has the key; None for values that are not finite."""
        return [(row["step"], finite(row[key])) for row in self.steps if key in row]

    def numbers(self, key: str) -> list[float]:
        """The finite values of a key in order."""
        return [y for _, y in self.column(key) if y is not None]

    @property
    def scored(self) -> dict[str, Any] | None:
        """The evaluation if it has held-out losses; `evaluation` may have tasks alone."""
        return self.evaluation if (self.evaluation or {}).get("base") else None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that the run had installed."""
        return {k: v for k, v in self.environment.get("versions", {}).items() if v is not None}

    @property
    def seconds(self) -> float:
        """Seconds spent in steps; `seconds` of a row is the time of one step."""
        last, total = 0, 0.0
        for row in self.steps:
            total += (finite(row.get("seconds")) or 0.0) * max(1, row["step"] - last)
            last = row["step"]
        return total


def read_run(run: RunDir) -> Record:
    """Read all files of `run`.

    Raises:
        RecipeError: its recipe is damaged.
        RunError: one of its JSON files is damaged.
    """
    resolved = read_resolved(run.recipe)
    steps, held = (
        tuple(row for row in read_metrics(run, held_out) if _is_step(row.get("step")))
        for held_out in (False, True)
    )
    shown = {
        k: without_path(v) if k in PATHS else v
        for k, v in resolved.recipe.model_dump(mode="json").items()
    }
    return Record(
        name=run.path.resolve().name,
        recipe=resolved.recipe,
        shown=shown,
        origins=resolved.origins,
        data=_read(run.data_report),
        plan=_read(run.plan),
        environment=_read(run.environment),
        steps=steps,
        held=held,
        evaluation=_read(run.eval) or None,
        exports=_read(run.export / "verify.json"),
        finished=run.has_adapter(),
        best=best_step(run),
        start=_read(run.start),
        stopped=_read(run.stopped),
        rollouts=_last_rollouts(run),
    )


def _last_rollouts(run: RunDir) -> tuple[dict[str, Any], ...]:
    """Completions of the last logged step."""
    if not run.rollouts.exists():
        return ()
    rows = read_lines(run.rollouts)
    last = rows[-1].get("step") if rows else None
    return tuple(row for row in rows if row.get("step") == last)


def finite(value: Any) -> float | None:
    """`value` as a float; None for infinity, NaN, and everything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None


def held_out_loss(evaluation: Mapping[str, Any], held: Iterable[ReportRow]) -> float | None:
    """Held-out loss of the adapter by eval.json; without one, the lowest of the training so far."""
    tuned = evaluation.get("tuned")
    if isinstance(tuned, dict) and (loss := finite(tuned.get("loss"))) is not None:
        return loss
    losses = (finite(row.get("eval_loss")) for row in held)
    return min((loss for loss in losses if loss is not None), default=None)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def without_path(value: Any) -> Any:
    """Reduce local paths to their last component, recursively."""
    if isinstance(value, list):
        return [without_path(entry) for entry in value]
    if isinstance(value, dict):
        return {key: without_path(entry) for key, entry in value.items()}
    local = isinstance(value, str) and value.startswith(("/", ".", "~"))
    return PurePosixPath(value).name or value if local else value


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(
            f"{path}: cannot be read: {error}", hint="remove it: the report works without it"
        ) from error
    if not isinstance(value, dict):
        raise RunError(
            f"{path}: found {type(value).__name__}, expected an object",
            hint="remove it: the report works without it",
        )
    return value
