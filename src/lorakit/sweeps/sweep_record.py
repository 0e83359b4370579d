"""The record of a sweep: its folder, and `sweep.json` with the state of each run.

    sweeps/<name>/ sweep.json · sweep.yaml · compare.html · <run>/ ...

`sweep.yaml` is the recipe that all runs share, `sweep.json` has the varied settings and what
happened. Both are written atomically after each event, so a killed sweep knows what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorakit.errors import RunError
from lorakit.storage.run_dir import RunDir, read_json, write_json
from lorakit.sweeps.halving import mean_loss
from lorakit.sweeps.variations import Range, Varied, describe_settings

FORMAT = 1
# `waiting`: not started, or to be continued.
STATES = ("waiting", "finished", "stopped", "failed")


@dataclass(frozen=True, slots=True)
class SweepDir:
    """Paths of one sweep."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "sweep.json"

    @property
    def recipe(self) -> Path:
        """The recipe that all runs share."""
        return self.path / "sweep.yaml"

    @property
    def page(self) -> Path:
        """Page that compares the runs."""
        return self.path / "compare.html"

    def run(self, name: str) -> RunDir:
        """Directory of one run."""
        return RunDir(self.path / name)


@dataclass(slots=True)
class RunRecord:
    """One run of a sweep, as in `sweep.json`.

    Attributes:
        rungs: held-out loss by the step after which halving compared the runs.
        held_out: held-out loss of the finished adapter.
        step: the last step that was trained.
        reason: why the run failed or was stopped.
    """

    name: str
    configuration: int
    settings: dict[str, Any]
    state: str = "waiting"
    steps: int = 0
    step: int = 0
    rungs: dict[str, float | None] = field(default_factory=dict)
    held_out: float | None = None
    seconds: float = 0.0
    reason: str | None = None

    def describe(self) -> str:
        """Name the run by its settings, for messages."""
        return describe_settings(self.settings) or self.name


@dataclass(slots=True)
class SweepRecord:
    """A sweep, as in `sweep.json`: what it varies and the state of its runs.

    Attributes:
        comparable: all configurations are scored on the same held-out rows.
        kept: configurations that went on, for each rung of halving that is decided.
    """

    vary: dict[str, Varied]
    seeds: int = 1
    halving: bool = False
    trials: int | None = None
    comparable: bool = True
    kept: list[list[int]] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)

    def request(self) -> dict[str, Any]:
        """The part that a command line gives; a resume cannot change it."""
        vary = {
            key: asdict(values) if isinstance(values, Range) else list(values)
            for key, values in self.vary.items()
        }
        return {
            "vary": vary,
            "seeds": self.seeds,
            "halving": self.halving,
            "trials": self.trials,
        }

    def write(self, folder: SweepDir) -> None:
        """Write `sweep.json`."""
        values = {
            "format": FORMAT,
            **self.request(),
            "comparable": self.comparable,
            "kept": self.kept,
            "runs": [asdict(run) for run in self.runs],
        }
        write_json(folder.record, values)

    def configurations(self) -> dict[int, list[RunRecord]]:
        """The runs of each configuration, one per seed."""
        found: dict[int, list[RunRecord]] = {}
        for run in self.runs:
            found.setdefault(run.configuration, []).append(run)
        return found

    def ranking(self) -> list[tuple[float, int]]:
        """(mean held-out loss, configuration) of the finished configurations, best first."""
        means = [
            (mean_loss([run.held_out for run in runs]), number)
            for number, runs in self.configurations().items()
            if all(run.state == "finished" for run in runs)
        ]
        return sorted(pair for pair in means if math.isfinite(pair[0]))

    def best(self) -> RunRecord | None:
        """The run with the lowest loss of the best configuration; None if none can be compared."""
        ranking = self.ranking()
        if not ranking or not self.comparable:
            return None
        runs = self.configurations()[ranking[0][1]]
        return min(runs, key=lambda run: (run.held_out or 0.0, run.name))


def read_record(folder: SweepDir) -> SweepRecord:
    """Read `sweep.json`.

    Raises:
        RunError: the folder holds no sweep, or its record is damaged.
    """
    if not folder.record.exists():
        raise RunError(
            f"{folder.path}: holds no sweep (no {folder.record.name} in it)",
            hint="give the folder that `lorakit sweep` printed, such as sweeps/demo-lora",
        )
    values = read_json(folder.record)
    try:
        if values["format"] != FORMAT:
            raise RunError(
                f"{folder.record}: has format {values['format']}, this version reads {FORMAT}",
                hint="resume it with the version of lorakit that started it",
            )
        runs = [_run(row) for row in values["runs"]]
        return SweepRecord(
            {key: _varied(given) for key, given in values["vary"].items()},
            int(values["seeds"]),
            bool(values["halving"]),
            values["trials"],
            bool(values["comparable"]),
            [[int(number) for number in kept] for kept in values["kept"]],
            runs,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{folder.record}: is damaged ({type(error).__name__}: {error})",
            hint="restore it from a copy; the runs in the folder are complete and can be resumed "
            "one by one with `lorakit train RUN/recipe.yaml --resume`",
        ) from error


def _run(row: dict[str, Any]) -> RunRecord:
    run = RunRecord(**{f.name: row[f.name] for f in fields(RunRecord)})
    if run.state not in STATES:
        raise ValueError(f"state {run.state!r}")
    return run


def _varied(given: dict[str, Any] | Sequence[Any]) -> Varied:
    return Range(**given) if isinstance(given, dict) else list(given)
