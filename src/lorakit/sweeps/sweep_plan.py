"""Check and plan all runs of a sweep before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.errors import LorakitError, RecipeError, RunError, WorkError
from lorakit.pipeline import PreparedRun, prepare_run
from lorakit.recipe.loader import ResolvedRecipe
from lorakit.storage.atomic_dir import free_bytes, megabytes
from lorakit.sweeps.halving import rung_shares, rung_step
from lorakit.sweeps.range_search import require_optuna
from lorakit.sweeps.variations import (
    Range,
    Variation,
    Varied,
    check_different,
    check_vary,
    combinations,
    runs_of,
)
from lorakit.train.checkpoint import SMALL_FILES, checkpoint_bytes
from lorakit.types import MemoryPlan


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """A sweep as it is asked for: a recipe, the settings to vary, and how to compare the runs."""

    recipe: ResolvedRecipe
    vary: Mapping[str, Varied]
    seeds: int = 1
    halving: bool = False
    trials: int | None = None

    def check(self) -> None:
        """Check everything that needs no model.

        Raises:
            RecipeError: a setting cannot vary, or options do not go together.
            DependencyError: a search without Optuna.
        """
        if not self.vary and self.seeds == 1:
            raise RecipeError(
                "a sweep needs settings to vary",
                hint="give --vary learning_rate=5e-5,1e-4,2e-4, or --seeds 3",
            )
        for name, value in (("seeds", self.seeds), ("trials", self.trials)):
            if value is not None and value < 1:
                raise RecipeError(f"--{name}: found {value}, expected 1 or more")
        check_vary(self.recipe, self.vary, self.seeds)
        if self.trials is None:
            return
        if self.halving:
            raise RecipeError(
                "--halving compares runs that are all known, --trials searches one after the other",
                hint="keep one of them",
            )
        if not self.vary:
            raise RecipeError("--trials needs a range", hint="--vary learning_rate=1e-5..1e-3")
        require_optuna()

    def listed(self) -> list[Variation]:
        """All runs, in their order; of a search, those with the ends of the ranges."""
        if self.trials is None:
            chosen = combinations(self.vary)
        else:
            chosen = [_ends(self.vary, last) for last in (False, True)]
        digits = len(str(self.trials or len(chosen)))
        runs = [
            run
            for number, settings in enumerate(chosen)
            for run in runs_of(self.recipe, settings, number, self.seeds, digits)
        ]
        if self.trials is None:
            check_different(runs)
        return runs


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run with its steps, its memory and the content of its held-out rows."""

    run: Variation
    steps: int
    plan: MemoryPlan
    held_out: str
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """All runs of a sweep, and what they need together.

    Attributes:
        comparable: all configurations are scored on the same held-out rows.
        count: runs of the sweep; a search has more than it lists.
        steps: optimizer steps of all runs, with those that halving saves taken off.
    """

    runs: tuple[PlannedRun, ...]
    comparable: bool
    count: int
    steps: int
    full_steps: int
    first: PreparedRun

    @property
    def largest(self) -> PlannedRun:
        """The run that takes the most memory."""
        return max(self.runs, key=lambda planned: planned.plan.total_bytes)

    @property
    def disk_bytes(self) -> int:
        """Checkpoints and adapters of all runs."""
        return sum(p.disk_bytes for p in self.runs) * self.count // len(self.runs)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "runs": [
                {"name": p.run.name, "settings": p.run.settings, "steps": p.steps}
                for p in self.runs
            ],
            "count": self.count,
            "steps": self.steps,
            "steps_without_halving": self.full_steps,
            "comparable": self.comparable,
            "disk_bytes": self.disk_bytes,
            "largest_run": self.largest.run.name,
            "memory": self.largest.plan.as_dict(),
        }


def plan_sweep(request: SweepRequest, console: Console, force: bool = False) -> SweepPlan:
    """Check each configuration as a run is checked, and add up what the sweep needs.

    Runs are trained one after the other on one base, so the memory is that of the largest run.

    Args:
        force: accept plans that do not fit into memory.

    Raises:
        LorakitError: a configuration cannot be trained; lists all that cannot.
    """
    request.check()
    runs = request.listed()
    quiet = Console(quiet=True)
    planned: list[PlannedRun] = []
    first: PreparedRun | None = None
    faults: list[tuple[Variation, LorakitError]] = []
    configurations: dict[int, PlannedRun] = {}
    for run in runs:
        known = configurations.get(run.configuration)
        if known is not None:  # another seed: same steps and memory
            planned.append(PlannedRun(run, known.steps, known.plan, "", known.disk_bytes))
            continue
        try:
            start = prepare_run(run.resolved, console if first is None else quiet, force)
        except LorakitError as error:
            faults.append((run, error))
            continue
        first = first or start
        configurations[run.configuration] = _planned(run, start)
        planned.append(configurations[run.configuration])
    if faults or first is None:
        raise _cannot_start(faults, len({run.configuration for run in runs}))
    held_out = {p.held_out for p in configurations.values()}
    comparable = len(held_out) == 1 and "" not in held_out
    if (request.halving or request.trials) and not comparable:
        raise _not_comparable(request, "" in held_out)
    count = len(runs) if request.trials is None else request.trials * request.seeds
    full = sum(p.steps for p in planned) * count // len(planned)
    steps = _halved(planned) if request.halving else full
    return SweepPlan(tuple(planned), comparable, count, steps, full, first)


def require_sweep_space(plan: SweepPlan, folder: Path) -> None:
    """Check that the disk holds the checkpoints and adapters of all runs.

    Raises:
        WorkError: it does not.
    """
    needs, free = plan.disk_bytes, free_bytes(folder)
    if free < needs:
        raise WorkError(
            f"{folder}: too little space: {plan.count} runs take {megabytes(needs)}, "
            f"{megabytes(free)} free",
            hint="free some space, choose another disk with --output, or keep fewer checkpoints: "
            "--set keep_checkpoints=1",
        )


def _planned(run: Variation, start: PreparedRun) -> PlannedRun:
    recipe, prepared = start.resolved.recipe, start.prepared
    adapter = start.plan.parts.get("adapters (float32)", 0)
    disk = (recipe.kept_checkpoints + 1) * checkpoint_bytes(recipe, adapter // 4)
    return PlannedRun(
        run,
        recipe.total_steps(len(prepared.train)),
        start.plan,
        prepared.val.digest() if len(prepared.val) else "",
        disk + adapter + SMALL_FILES,
    )


def _ends(vary: Mapping[str, Varied], last: bool) -> dict[str, Any]:
    """The first or the last value of each key, and of a range its lower or upper end."""
    chosen = {}
    for key, values in vary.items():
        if isinstance(values, Range):
            end = values.high if last else values.low
            chosen[key] = int(end) if values.whole else end
        else:
            chosen[key] = values[-1 if last else 0]
    return chosen


def _halved(planned: Sequence[PlannedRun]) -> int:
    """Steps that halving trains, if the first configurations are the better ones."""
    alive = list(dict.fromkeys(p.run.configuration for p in planned))
    done = {p.run.name: 0 for p in planned}
    for share in rung_shares(len(alive), min(p.steps for p in planned)):
        for p in planned:
            if p.run.configuration in alive:
                done[p.run.name] = rung_step(share, p.steps)
        alive = alive[: -(-len(alive) // 2)]
    return sum(p.steps if p.run.configuration in alive else done[p.run.name] for p in planned)


def _cannot_start(faults: Sequence[tuple[Variation, LorakitError]], count: int) -> LorakitError:
    """One error for all configurations that cannot be trained."""
    same = {error.message for _, error in faults}
    if len(same) == 1 and len(faults) == count:  # the recipe itself
        return faults[0][1]
    lines = [f"  {run.name}: {error.message}" for run, error in faults]
    hints = list(dict.fromkeys(error.hint for _, error in faults if error.hint))
    return RecipeError(
        f"{len(faults)} of {count} configurations cannot be trained; nothing was started:\n"
        + "\n".join(lines),
        hint="; or ".join(hints[:3]) or None,
    )


def _not_comparable(request: SweepRequest, missing: bool) -> RunError:
    option = "--halving" if request.halving else "--trials"
    if missing:
        return RunError(
            f"{option} compares held-out losses, and no rows are held out",
            hint="set val_size or val_data",
        )
    return RunError(
        f"{option} compares held-out losses, but the configurations have different held-out rows",
        hint=f"vary data settings without {option}, or give the same rows to all with val_data",
    )
