"""A resolved recipe enters; the run directory it may write into, and where to go on, leave."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.data.shelf import Examples
from lorakit.errors import RunError, WorkError
from lorakit.lock import LOCK
from lorakit.model.load import public_name
from lorakit.recipe_file import ResolvedRecipe
from lorakit.records import Device
from lorakit.run_dir import RunDir, read_metrics, write_json, write_text
from lorakit.train.checkpoint import Checkpoint, require_checkpoint
from lorakit.train.past import differences, refuse_changed_past, versions


def claim_run(resolved: ResolvedRecipe, resume: bool) -> tuple[RunDir, ResolvedRecipe]:
    """The run directory: the named one, or a new one under runs/; never another run's.

    Raises:
        RunError: the folder holds a run already (without --resume), or none (with it).
    """
    recipe = resolved.recipe
    if resume and resolved.folder and RunDir(resolved.folder).environment.exists():
        return RunDir(resolved.folder), resolved  # `train runs/x/recipe.yaml --resume`
    if recipe.output_dir is not None:
        run = RunDir(Path(recipe.output_dir))
        if run.holds_work() and not resume:
            raise RunError(
                f"{run.path}: holds another run already; it is never overwritten",
                hint="go on with --resume, or give a new name with --output",
            )
    else:
        stem = f"{public_name(recipe.model).split('/')[-1].lower()}-{recipe.method}"
        run = _newest(stem) if resume else _free(stem)
        resolved = resolved.derive("model and method", output_dir=str(run.path))
    # A run that was killed before its first file left at least its folder.
    if resume and not run.path.is_dir():
        raise RunError(
            f"{run.path}: nothing to resume here",
            hint="name the run's folder with --output, or start without --resume",
        )
    _check_writable(run)
    return run, resolved


def prepare_resume(
    run: RunDir, past: Mapping[str, Any], train: Examples, steps: int, console: Console
) -> Checkpoint | None:
    """The checkpoint to go on from; nothing is written yet.

    Args:
        past: what the steps hang on now, see `past.py`.
        steps: the steps that the whole run has now.

    Returns:
        None where the run was ended before its first checkpoint: it begins again.

    Raises:
        RunError: no whole checkpoint is left, or something changed that would alter the past.
    """
    found, notes = require_checkpoint(run)
    for note in notes:
        console.print(f"note: {note}")
    if found is None:
        console.print(f"{run.path} has no checkpoint yet: it begins at step 0")
        return None
    refuse_changed_past(run, found.facts["past"], past, train)
    if found.step > steps:
        raise RunError(
            f"{run.path}: {found.step} steps are taken already, the recipe asks for {steps}",
            hint="raise max_steps or epochs; the adapter of fewer steps needs a run of its own",
        )
    console.print(f"resuming {run.path} from step {found.step} of {steps}")
    if found.facts["steps"] != steps:
        console.print(
            f"         {found.facts['steps']} steps were planned before: the learning rate goes "
            f"on as a run of {steps} steps has it from here"
        )
    for line in differences(found.facts["past"], past):
        console.print(f"note: {line}")
    return found


def forget_after(run: RunDir, step: int) -> None:
    """Drop the rows of metrics.jsonl after `step`: these steps are taken again."""
    known = [*read_metrics(run), *read_metrics(run, held_out=True)]
    rows = sorted((r for r in known if r.get("step", 0) <= step), key=lambda r: r.get("step", 0))
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def write_run_files(
    run: RunDir,
    resolved: ResolvedRecipe,
    report: dict[str, Any],
    plan: dict[str, Any],
    device: Device,
) -> None:
    """recipe.yaml, data_report.json, plan.json and environment.json; no path of this machine."""
    portable = {
        "model": _portable(resolved.recipe.model, resolved, run),
        "data": [
            {"source": _portable(source, resolved, run), "weight": weight}
            if weight != 1
            else _portable(source, resolved, run)
            for source, weight in zip(resolved.recipe.sources, resolved.recipe.weights, strict=True)
        ],
        "output_dir": run.path.name,
    }
    if resolved.recipe.val_data:
        portable["val_data"] = _portable(resolved.recipe.val_data, resolved, run)
    origins = dict(resolved.origins)
    saved = resolved.derive("", **portable)
    write_json(run.data_report, report)
    write_json(run.plan, plan)
    write_json(run.environment, environment(device))
    # Last: a folder with a recipe is a run.
    write_text(run.recipe, ResolvedRecipe(saved.recipe, origins).to_yaml())


def environment(device: Device) -> dict[str, Any]:
    """Versions and hardware of this machine, free of names and paths."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions(),
        "device": device.name,
        "kind": device.kind,
        "memory_bytes": device.memory_bytes,
        "dtype": device.dtype,
        "reasons": device.reasons,
    }


def _free(stem: str) -> RunDir:
    for number in range(1, 10_000):
        run = RunDir(Path("runs") / (stem if number == 1 else f"{stem}-{number}"))
        if not run.path.exists() or _is_empty(run.path):
            return run
    raise RunError(f"runs/{stem}: 9,999 runs of this name exist", hint="name one with --output")


def _newest(stem: str) -> RunDir:
    """The newest run that `_free` named; not another model's, not a folder of other files."""
    runs, name = Path("runs"), re.compile(re.escape(stem) + r"(-\d+)?")
    named = [p for p in (runs.iterdir() if runs.is_dir() else ()) if name.fullmatch(p.name)]
    # One killed before its recipe was written left its lock, or nothing.
    found = [p for p in named if RunDir(p).has_run() or (p / LOCK).exists() or _is_empty(p)]
    if not found:
        raise RunError(
            f"runs/{stem}: nothing to resume here", hint="name the run's folder with --output"
        )
    return RunDir(max(found, key=lambda p: p.stat().st_mtime))


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _check_writable(run: RunDir) -> None:
    """Without creating anything yet: a run that fails on its input leaves no folder behind."""
    place = run.path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = "read-only" if place.is_dir() else "a file"
        raise WorkError(
            f"{run.path}: cannot be written ({place} is {what})",
            hint="choose another place with --output",
        )


def _portable(text: str, resolved: ResolvedRecipe, run: RunDir) -> str:
    """A local path as seen from the run directory; names of hub repositories stay as they are."""
    if text.split(":")[0] == "demo":
        return text
    for folder in (Path(), *([resolved.folder] if resolved.folder else [])):
        path = folder / Path(text).expanduser()
        if path.exists():
            return os.path.relpath(path.resolve(), run.path.resolve())
    return text
