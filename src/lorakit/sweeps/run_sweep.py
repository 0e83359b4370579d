"""Train the runs of a sweep one after the other, on one loaded base.

Each run is trained by `pipeline.fit`, as `lorakit train` does it: same order of rows, same random
numbers, same bits. Halving pauses runs at a checkpoint and resumes the better ones, which gives
the bits of an uninterrupted run, too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakit.distributed.launch_env import launch_environment
from lorakit.errors import LorakitError, RunError, first_line
from lorakit.model.load import public_name
from lorakit.model.shared_base import SharedBase
from lorakit.objects import Objects
from lorakit.pipeline import TrainResult, fit
from lorakit.recipe.loader import ResolvedRecipe, load_recipe
from lorakit.redact import redacted
from lorakit.report.page import renew_report
from lorakit.storage.atomic_dir import remove_leftovers
from lorakit.storage.run_dir import pasted, write_json, write_text
from lorakit.storage.run_lock import LOCK, only_writer
from lorakit.sweeps.halving import mean_loss, rung_shares, rung_step, survivors
from lorakit.sweeps.range_search import propose
from lorakit.sweeps.sweep_page import renew_sweep_page
from lorakit.sweeps.sweep_plan import SweepPlan, SweepRequest, plan_sweep, require_sweep_space
from lorakit.sweeps.sweep_record import RunRecord, SweepDir, SweepRecord, read_record
from lorakit.sweeps.variations import Varied, runs_of, with_settings
from lorakit.train.oom import free_caches
from lorakit.train.resume import anchored, portable

# First words of the lines that a run prints before its first step, and that describe it.
START_LINES = {
    *("device", "dtype", "bits", "adapters", "frozen", "start", "data", "memory", "speed"),
    *("training", "layers", "loss", "packing", "tasks"),
}


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Outcome of a sweep; `exit_code` is 1 if runs failed, or 128 + signal if it was stopped."""

    folder: SweepDir
    record: SweepRecord
    exit_code: int = 0
    base_loads: int = 0


def start_sweep(request: SweepRequest, console: Console, force: bool = False) -> SweepResult:
    """Train all runs of a new sweep, in the recipe's `output_dir` or a new folder of sweeps/.

    Args:
        force: train even if a plan does not fit into memory.

    Raises:
        LorakitError: a setting or configuration cannot be used, or the folder holds a sweep. A run
            that fails later is recorded, and the others go on.
    """
    _one_process()
    given = request.recipe.recipe.output_dir
    folder = SweepDir(Path(given)) if given else _free_folder(request.recipe)
    if folder.record.exists():
        raise RunError(
            f"{folder.path}: already holds a sweep, which is never overwritten",
            hint=f"continue it with: lorakit sweep {pasted(folder.path)} --resume, or give a new "
            "name with --output",
        )
    if _holds_files(folder.path):
        raise RunError(f"{folder.path}: is not empty", hint="give a new folder with --output")
    printed: set[str] = set()
    with without_repeats(console, printed) as shown:
        plan = plan_sweep(request, shown, force)
    require_sweep_space(plan, folder.path)
    with only_writer(folder.run(""), console.print):
        recipe = _write_recipe(request.recipe, folder, plan)
        record = SweepRecord(
            dict(request.vary), request.seeds, request.halving, request.trials, plan.comparable
        )
        if request.trials is None:
            record.runs = [
                RunRecord(p.run.name, p.run.configuration, p.run.settings, steps=p.steps)
                for p in plan.runs
            ]
        record.write(folder)
        return _Sweep(folder, record, recipe, console, force, printed).train()


def resume_sweep(
    path: Path, console: Console, force: bool = False, vary: Mapping[str, Varied] | None = None
) -> SweepResult:
    """Continue a stopped or killed sweep; runs that failed are tried again.

    Args:
        vary: the settings to vary if they are given again, which must be those of the record.

    Raises:
        LorakitError: the folder holds no sweep, or its record is damaged.
    """
    _one_process()
    folder = SweepDir(path)
    record = read_record(folder)
    if vary is not None:
        _check_same(folder, record, vary)
    with only_writer(folder.run(""), console.print):
        record = read_record(folder)
        remove_leftovers(folder.path)
        recipe = anchored(load_recipe(folder.recipe))
        alive = record.kept[-1] if record.kept else [run.configuration for run in record.runs]
        for run in record.runs:
            if run.state == "failed" and run.configuration in alive:
                run.state, run.reason = "waiting", None
        return _Sweep(folder, record, recipe, console, force, set()).train()


class _Interrupted(Exception):
    """A signal stopped the run under way, which saved a checkpoint."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


class _Sweep:
    """A sweep under way."""

    def __init__(
        self,
        folder: SweepDir,
        record: SweepRecord,
        recipe: ResolvedRecipe,
        console: Console,
        force: bool,
        printed: set[str],
    ) -> None:
        self.folder, self.record, self.recipe = folder, record, recipe
        self.console, self.force = console, force
        self.shared = SharedBase()
        self.printed = printed

    def train(self) -> SweepResult:
        """Train what is left."""
        exit_code = 0
        try:
            if self.record.trials is not None:
                self._search(self.record.trials)
            elif self.record.halving:
                self._halve()
            else:
                for run in self.record.runs:
                    self._advance(run)
        except _Interrupted as stop:
            exit_code = stop.exit_code
        finally:
            self.shared.release()
        renew_sweep_page(self.folder, self.record, self.console.print)
        if not exit_code and any(run.state == "failed" for run in self.record.runs):
            exit_code = 1
        return SweepResult(self.folder, self.record, exit_code, self.shared.loads)

    def _halve(self) -> None:
        """Train to each rung, stop the worse half there, and train the rest to the end."""
        configurations = self.record.configurations()
        alive = list(configurations)
        shortest = min(run.steps for run in self.record.runs)
        for number, share in enumerate(rung_shares(len(configurations), shortest)):
            if number < len(self.record.kept):  # decided before a resume
                alive = self.record.kept[number]
                continue
            losses = {}
            for configuration in alive:
                runs = configurations[configuration]
                for run in runs:
                    self._advance(run, rung_step(share, run.steps))
                losses[configuration] = mean_loss([_rung_loss(run, share) for run in runs])
            alive = survivors(losses)
            self.record.kept.append(alive)
            self._stop_others(losses, alive, share)
            self.record.write(self.folder)
        for configuration in alive:
            for run in configurations[configuration]:
                self._advance(run)

    def _stop_others(self, losses: dict[int, float], alive: list[int], share: float) -> None:
        kept = [losses[number] for number in alive]
        limit = (
            f"the configurations that go on have at most {max(kept):.4f}" if kept else "all failed"
        )
        for run in self.record.runs:
            if run.configuration not in losses or run.configuration in alive:
                continue
            if run.state != "waiting":
                continue
            loss = losses[run.configuration]
            found = f"held-out loss {loss:.4f}" if math.isfinite(loss) else "a seed of it failed"
            run.state = "stopped"
            run.reason = f"Stopped by the sweep at step {run.step} of {run.steps}: {found}, {limit}"
            target = self.folder.run(run.name)
            if target.path.is_dir():
                values = {"step": run.step, "steps": run.steps, "reason": run.reason}
                write_json(target.stopped, values)
                renew_report(target, self.console.print)
            self.console.print(f"{run.describe()}: {run.reason}")

    def _search(self, trials: int) -> None:
        """Let Optuna propose one configuration after the other."""
        record, digits = self.record, len(str(trials))
        for number in range(trials):
            known = record.configurations()
            if number not in known:
                results = [(_chosen(runs[0], record), _result(runs)) for runs in known.values()]
                settings = propose(record.vary, results, self.recipe.recipe.seed)
                if settings is None:
                    self.console.print(f"all combinations were tried after {number} trials")
                    return
                made = runs_of(self.recipe, settings, number, record.seeds, digits)
                record.runs += [RunRecord(r.name, number, r.settings) for r in made]
                record.write(self.folder)
            for run in record.configurations()[number]:
                self._advance(run)

    def _advance(self, run: RunRecord, until: int | None = None) -> None:
        """Train a run to step `until`, or to its end, unless that is done."""
        if run.state != "waiting" or (until is not None and str(until) in run.rungs):
            return
        target = self.folder.run(run.name)
        count = len(self.record.runs) if self.record.trials is None else self.record.trials
        number = self.record.runs.index(run) + 1
        goal = "" if until is None else f" to step {until}"
        self.console.print(f"\nrun {number} of {count}{goal}: {run.describe()}")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            # Layers compiled for the modules of earlier runs would count against torch's limit.
            torch.compiler.reset()
        began = time.perf_counter()
        try:
            resolved = with_settings(self.recipe, run.settings)
            resolved = resolved.derive("the sweep", output_dir=str(target.path))
            objects, resume = Objects(shared=self.shared), target.path.is_dir()
            with without_repeats(self.console, self.printed) as console:
                outcome = fit(resolved, console, resume, self.force, objects, until)
        except Exception as error:
            self._failed(run, error)
            outcome = None
        run.seconds = round(run.seconds + time.perf_counter() - began, 2)
        # The error and its frames are gone here, and with them the tensors of the failed run.
        free_caches()
        if outcome is not None:
            _note_outcome(run, outcome, until)
        self.record.write(self.folder)
        if outcome is not None and outcome.exit_code:
            raise _Interrupted(outcome.exit_code)

    def _failed(self, run: RunRecord, error: Exception) -> None:
        """Record a failed run; the others go on."""
        run.state = "failed"
        if isinstance(error, LorakitError):
            run.reason = error.message
            self.console.print(f"failed: {run.describe()}: {error.message}")
            if error.hint:
                self.console.print(f"hint: {error.hint}")
            return
        # A bug: its traceback is shown, and the other runs are worth finishing.
        run.reason = f"{type(error).__name__}: {first_line(error)}"
        self.console.print(f"failed: {run.describe()}: {run.reason}")
        self.console.print_exception()


@contextmanager
def without_repeats(console: Console, printed: set[str]) -> Iterator[Console]:
    """Leave out the lines about a run's start that an earlier run has printed.

    Args:
        printed: the lines so far, to which new ones are added.
    """
    plain = console.print

    def print_new(*objects: Any, **settings: Any) -> None:
        text = str(objects[0]) if len(objects) == 1 else ""
        if text.partition(" ")[0] in START_LINES:
            if text in printed:
                return
            printed.add(text)
        plain(*objects, **settings)

    console.print = print_new  # type: ignore[method-assign]
    try:
        yield console
    finally:
        del console.print


def _note_outcome(run: RunRecord, outcome: TrainResult, until: int | None) -> None:
    run.step = outcome.steps
    if outcome.exit_code:
        return
    if outcome.paused is not None:
        run.rungs[str(until)] = _finite(outcome.paused.loss)
        return
    run.state, run.steps = "finished", run.steps or run.step
    tuned = outcome.evaluation.tuned if outcome.evaluation else None
    run.held_out = _finite(tuned.loss) if tuned else None


def _rung_loss(run: RunRecord, share: float) -> float | None:
    """The held-out loss of a run at a rung; of one that ended before it, that of its adapter."""
    ended = run.held_out if run.state == "finished" else None
    return run.rungs.get(str(rung_step(share, run.steps)), ended)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _chosen(run: RunRecord, record: SweepRecord) -> dict[str, object]:
    """The settings of a configuration that were proposed: without the seed of `--seeds`."""
    return {key: value for key, value in run.settings.items() if key in record.vary}


def _result(runs: list[RunRecord]) -> float:
    return mean_loss([run.held_out if run.state == "finished" else None for run in runs])


def _write_recipe(resolved: ResolvedRecipe, folder: SweepDir, plan: SweepPlan) -> ResolvedRecipe:
    """Write `sweep.yaml` with the settings that were given, and read it back.

    A date that the chat template prints is fixed for all runs.
    """
    if date := plan.first.resolved.recipe.template_date:
        resolved = resolved.derive("today, which the chat template prints", template_date=date)
    saved = portable(resolved, folder.path)
    lines = ["# The settings that all runs of this sweep share; sweep.json has the varied ones."]
    for key, value in saved.recipe.model_dump(mode="json").items():
        if key != "output_dir" and not saved.origins[key].startswith("default"):
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}  # {saved.origins[key]}")
    text = "\n".join(lines) + "\n"
    write_text(folder.recipe, text)
    # Secrets, as in an address, are not written; this session still needs them.
    return anchored(load_recipe(folder.recipe)) if redacted(text) == text else resolved


def _free_folder(resolved: ResolvedRecipe) -> SweepDir:
    recipe = resolved.recipe
    stem = f"{public_name(recipe.model).split('/')[-1].lower()}-{recipe.method}"
    for number in range(1, 10_000):
        path = Path("sweeps") / (stem if number == 1 else f"{stem}-{number}")
        if not _holds_files(path):
            return SweepDir(path)
    raise RunError(f"sweeps/{stem}: 9,999 sweeps exist", hint="name one with --output")


def _holds_files(path: Path) -> bool:
    """True if a folder holds more than a sweep killed before its first record left there."""
    entries = path.iterdir() if path.is_dir() else ()
    names = {entry.name.removesuffix(".tmp") for entry in entries}
    return path.is_file() or bool(names - {LOCK, SweepDir(path).recipe.name})


def _check_same(folder: SweepDir, record: SweepRecord, vary: Mapping[str, Varied]) -> None:
    before, now = record.request()["vary"], SweepRecord(dict(vary)).request()["vary"]
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise RunError(
            f"{folder.path}: --vary {changed[0]} is not what this sweep was started with",
            hint=f"leave it out: lorakit sweep {pasted(folder.path)} --resume; or start a new "
            "sweep with --output",
        )


def _one_process() -> None:
    if launch_environment():
        raise RunError(
            "a sweep trains in one process, and this is one of several ranks",
            hint="start it without a launcher, or start each run with `lorakit train --gpus N`",
        )
