"""Choose the run directory, and decide whether and where a run can resume.

Each checkpoint stores a fingerprint of everything that affects training steps. A resume compares it
with the present one: continuing with other data, another rate or another rank would produce an
adapter that no recipe describes.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorakit.data.dataset import Examples
from lorakit.data.tokenize.batch_tokenizer import tokenizer_key
from lorakit.dependencies import installed_version
from lorakit.errors import RecipeError, RunError, WorkError
from lorakit.model.load import public_name
from lorakit.recipe.loader import ResolvedRecipe, load_recipe
from lorakit.recipe.schema import RENAMED, EvalTask, Recipe, RewardFunction
from lorakit.storage.atomic_dir import existing_parent
from lorakit.storage.run_dir import RunDir, read_lines, read_metrics, write_json, write_text
from lorakit.storage.run_lock import LOCK
from lorakit.train.checkpoint import Checkpoint, require_checkpoint
from lorakit.train.training_args import FORWARDED
from lorakit.types import Device


def resolve_run_dir(resolved: ResolvedRecipe, resume: bool) -> tuple[RunDir, ResolvedRecipe]:
    """Choose the run directory: the named one or a new one under runs/, never another run's.

    Raises:
        RunError: the folder already holds a run (without --resume), or holds none (with it).
    """
    recipe = resolved.recipe
    if resume and resolved.folder and RunDir(resolved.folder).environment.exists():
        return RunDir(resolved.folder), resolved  # `train runs/x/recipe.yaml --resume`
    if recipe.output_dir is not None:
        run = RunDir(Path(recipe.output_dir))
        if run.holds_work() and not resume:
            raise RunError(
                f"{run.path}: already holds another run, which is never overwritten",
                hint="resume with --resume, or give a new name with --output",
            )
    else:
        stem = f"{public_name(recipe.model).split('/')[-1].lower()}-{recipe.method}"
        run = _newest(stem) if resume else _free(stem)
        resolved = resolved.derive("model and method", output_dir=str(run.path))
    # A run that was killed before its first file has at least created its folder.
    if resume and not run.path.is_dir():
        raise RunError(
            f"{run.path}: nothing to resume here",
            hint="name the run's folder with --output, or start without --resume",
        )
    _check_writable(run)
    if resume and recipe.template_date is None:
        # On another day a template that prints the date would render other prompts.
        resolved = resolved.derive("the day on which the run began", template_date=_date_of(run))
    return run, resolved


def _date_of(run: RunDir) -> str | None:
    """The `template_date` of a run; None if its recipe is not written yet, or cannot be read."""
    try:
        return load_recipe(run.recipe).recipe.template_date
    except RecipeError:
        return None


def prepare_resume(
    run: RunDir, fingerprint: Mapping[str, Any], train: Examples, steps: int, console: Console
) -> Checkpoint | None:
    """Find the checkpoint to resume from, without writing anything.

    Args:
        fingerprint: see `run_fingerprint`.
        steps: total steps of the run with the present settings.

    Returns:
        The checkpoint, or None if the run ended before its first one and starts again.

    Raises:
        RunError: no complete checkpoint is left, or a change would alter steps already taken.
    """
    checkpoint, notes = require_checkpoint(run)
    for note in notes:
        console.print(f"note: {note}")
    if checkpoint is None:
        console.print(f"{run.path} has no checkpoint yet: it begins at step 0")
        return None
    check_resume_compatible(run, checkpoint.facts["past"], fingerprint, train)
    if checkpoint.step > steps:
        raise RunError(
            f"{run.path}: {checkpoint.step} steps are taken already, the recipe has {steps}",
            hint="raise max_steps or epochs, or start a new run for an adapter of fewer steps",
        )
    console.print(f"resuming {run.path} from step {checkpoint.step} of {steps}")
    if checkpoint.facts["steps"] != steps:
        console.print(
            f"         {checkpoint.facts['steps']} steps were planned before: the learning rate "
            f"continues as in a run of {steps} steps"
        )
    for line in harmless_changes(checkpoint.facts["past"], fingerprint):
        console.print(f"note: {line}")
    return checkpoint


def truncate_metrics(run: RunDir, step: int) -> None:
    """Drop the rows of metrics.jsonl and rollouts.jsonl after `step`: they are repeated."""
    if run.rollouts.exists():
        kept = [r for r in read_lines(run.rollouts) if r.get("step", 0) <= step]
        write_text(run.rollouts, "".join(json.dumps(row) + "\n" for row in kept))
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
    """Write recipe.yaml, data_report.json, plan.json and environment.json without local paths."""
    saved = portable(resolved, run.path)
    write_json(run.data_report, report)
    write_json(run.plan, plan)
    write_json(run.environment, environment(device))
    # The recipe is written last: it marks the folder as a run.
    write_text(run.recipe, saved.to_yaml())


def portable(resolved: ResolvedRecipe, folder: Path) -> ResolvedRecipe:
    """Copy a recipe with its local paths relative to `folder`, into which it will be written."""
    moved = _with_paths(resolved, lambda text: _portable(text, resolved, folder))
    return ResolvedRecipe(moved.derive("", output_dir=folder.name).recipe, moved.origins)


def anchored(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """Copy a recipe whose paths are relative to its own folder, with absolute paths.

    Other relative paths are looked up in the current folder first, where another file may be.
    """
    folder = resolved.folder or Path()

    def change(text: str) -> str:
        found = text.split(":")[0] != "demo" and (folder / Path(text).expanduser()).exists()
        return str((folder / text).resolve()) if found else text

    return replace(_with_paths(resolved, change), folder=resolved.folder)


def _with_paths(resolved: ResolvedRecipe, change: Callable[[str], str]) -> ResolvedRecipe:
    """Copy a recipe with each value that may be a local path changed; origins stay."""
    recipe = resolved.recipe
    values: dict[str, Any] = {
        "model": change(recipe.model),
        "data": [
            {"source": change(source), "weight": weight} if weight != 1 else change(source)
            for source, weight in zip(recipe.sources, recipe.weights, strict=True)
        ],
    }
    for key in ("val_data", "from_adapter"):
        if value := getattr(recipe, key):
            values[key] = change(value)
    values["reward_funcs"] = [
        entry if isinstance(entry, str) else _reward_with_paths(entry, change)
        for entry in recipe.reward_funcs
    ]
    values["eval_tasks"] = [_task_with_paths(each, change) for each in recipe.eval_tasks]
    return ResolvedRecipe(resolved.derive("", **values).recipe, dict(resolved.origins))


def environment(device: Device) -> dict[str, Any]:
    """Versions and hardware of this machine, without names and paths."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": library_versions(),
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
    # A run killed before its recipe was written has a lock or an empty folder.
    runs_of_stem = [p for p in named if RunDir(p).has_run() or (p / LOCK).exists() or _is_empty(p)]
    if not runs_of_stem:
        raise RunError(
            f"runs/{stem}: nothing to resume here", hint="name the run's folder with --output"
        )
    return RunDir(max(runs_of_stem, key=lambda p: p.stat().st_mtime))


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _check_writable(run: RunDir) -> None:
    """Check without creating anything: a run that fails on its input must not leave a folder."""
    ancestor = existing_parent(run.path.absolute())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        problem = "read-only" if ancestor.is_dir() else "a file"
        raise WorkError(
            f"{run.path}: cannot be written ({ancestor} is {problem})",
            hint="choose another folder with --output",
        )


def _portable(text: str, resolved: ResolvedRecipe, target: Path) -> str:
    """A local path relative to `target`; names of hub repositories are unchanged."""
    if text.split(":")[0] == "demo":
        return text
    for folder in resolved.folders:
        path = folder / Path(text).expanduser()
        if path.exists():
            return os.path.relpath(path.resolve(), target.resolve())
    return text


def _reward_with_paths(entry: RewardFunction, change: Callable[[str], str]) -> dict[str, Any]:
    """One of `reward_funcs` with the paths of its files changed."""
    values = entry.model_dump(exclude_unset=True)
    paths = {k: change(values[k]) for k in ("file", "schema_file") if values.get(k)}
    return {**values, **paths}


def _task_with_paths(entry: str | EvalTask, change: Callable[[str], str]) -> Any:
    """One of `eval_tasks` with the paths of its files changed."""

    def moved(name: str) -> str:
        return change(name) if "/" in name or "." in name else name

    def metric(text: str) -> str:
        name, _, argument = text.partition(":")
        if name.endswith(".py"):
            return f"{moved(name)}:{argument}"
        return f"{name}:{moved(argument)}" if name == "json_schema" else text

    if isinstance(entry, str):
        name, colon, tail = entry.rpartition(":")
        return f"{moved(name)}:{tail}" if colon and tail.isdigit() else moved(entry)
    changed = {"task": moved(entry.task), "metrics": [metric(each) for each in entry.metrics]}
    return {**entry.model_dump(), **changed}


# Settings that do not alter the steps already taken. Model and data are compared by content; a
# micro-batch may shrink after an OOM if a step keeps its examples.
CHANGEABLE_ON_RESUME = {
    "model",
    "from_adapter",
    "reward_funcs",  # compared by content, as the data
    "data",
    "val_data",
    "output_dir",
    "strict",
    "epochs",
    "max_steps",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "memory_limit",
    "weight_offload",
    "fsdp",
    "sharding",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "eval_tasks",
    "load_best_model_at_end",
    "early_stopping_patience",
    "log_every",
    "report_to",
    "offline",
    "memory_probe",
    "trust_remote_code",
}
VERSIONS = ("lorakit", "torch", "transformers", "peft", "trl", "datasets", "bitsandbytes")


def run_fingerprint(
    recipe: Recipe,
    train: Examples,
    tokenizer: Any,
    ranks: int = 1,
    start: str | None = None,
    rewards: str | None = None,
) -> dict[str, Any]:
    """Build the fingerprint from JSON values; it contains no path of this machine.

    Args:
        start: hash of the weights of the adapter that training started from.
        rewards: hash of the reward functions and of the columns that they read.
    """
    settings = recipe.model_dump(mode="json")
    forwarded = settings["training_args"]
    settings["training_args"] = {k: v for k, v in forwarded.items() if FORWARDED.get(k, True)}
    return {
        "settings": {key: settings[key] for key in sorted(settings.keys() - CHANGEABLE_ON_RESUME)},
        "examples per step": recipe.examples_per_step,
        "data": {
            "sha256": train.digest(),
            "examples": len(train),
            "tokens": int(train.lengths.sum()),
        },
        **({"start": start} if start else {}),
        **({"rewards": rewards} if rewards else {}),
        "tokenizer": tokenizer_key(tokenizer),
        "versions": library_versions(),
        "ranks": ranks,
    }


def library_versions() -> dict[str, str | None]:
    """Installed versions of the libraries that affect a run's numbers."""
    return {name: installed_version(name) for name in VERSIONS}


def remember_rows(run: RunDir, train: Examples) -> None:
    """Store the content hash of each row, to name changed rows on a resume."""
    np.save(run.rows, train.content_hashes)


def check_resume_compatible(
    run: RunDir, before: Mapping[str, Any], now: Mapping[str, Any], train: Examples
) -> None:
    """Compare a checkpoint's fingerprint with the present one.

    Raises:
        RunError: names everything that would alter the steps already taken.
    """
    lines = _changed_settings(before["settings"], now["settings"])
    if before["examples per step"] != now["examples per step"]:
        lines.append(
            f"micro_batch_size x gradient_accumulation_steps: was {before['examples per step']} "
            f"examples a step, is now {now['examples per step']}"
        )
    if before.get("start") != now.get("start"):
        lines.append("from_adapter: the adapter is not the one that this run started from")
    if before.get("rewards") != now.get("rewards"):
        lines.append(
            "reward_funcs: a function, its file or its settings, or the columns that it reads, are "
            "not those of the steps taken"
        )
    if lines:
        raise RunError(
            f"{run.path}: these settings would alter steps already taken:\n"
            + "\n".join(f"  {line}" for line in lines),
            hint="undo the change, or start a new run with --output",
        )
    if before["data"]["sha256"] != now["data"]["sha256"]:
        if before["tokenizer"] != now["tokenizer"]:
            raise RunError(
                f"{run.path}: the tokenizer or its chat template is not the one this run trained "
                "with, and its rows are tokenized differently",
                hint="restore that model folder, or start a new run with --output",
            )
        was, seen = before["data"], now["data"]
        raise RunError(
            f"{run.path}: the data is not what this run trained on: {_changed_rows(run, train)}\n"
            f"  then {was['examples']:,} examples, {was['tokens']:,} tokens, "
            f"sha256 {was['sha256'][:12]}; now {seen['examples']:,}, {seen['tokens']:,}, "
            f"{seen['sha256'][:12]}",
            hint="restore the data, or start a new run with --output",
        )


def harmless_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe changes that do not alter steps already taken, but may be worth knowing."""
    lines = []
    was, seen = before["versions"], now["versions"]
    changed = [f"{n} {was.get(n)} -> {v}" for n, v in seen.items() if was.get(n) != v]
    if changed:
        lines.append(f"other versions than before: {', '.join(changed)}")
    ranks = before.get("ranks", 1), now.get("ranks", 1)
    if ranks[0] != ranks[1]:
        lines.append(
            f"{ranks[0]} rank{'s' * (ranks[0] > 1)} before, {ranks[1]} now: each step has the same "
            "examples; dropout masks differ"
        )
    if before["tokenizer"] != now["tokenizer"]:
        # A newer tokenizers package may serialize the same tokenizer differently.
        lines.append("the tokenizer's files differ; the training rows are the same")
    return lines


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before = {RENAMED.get(key, key): value for key, value in before.items()}
    # An older version without this setting behaved as with its default.
    was = {
        key: before.get(key, Recipe.model_fields[key].get_default(call_default_factory=True))
        for key in now
    }
    return [f"{key}: was {was[key]!r}, is now {now[key]!r}" for key in now if was[key] != now[key]]


def _changed_rows(run: RunDir, train: Examples) -> str:
    try:
        before = np.load(run.rows, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return f"({run.rows.name} is missing, so the rows cannot be named)"
    hashes = train.content_hashes
    new = np.flatnonzero(~np.isin(hashes, before))
    removed = int((~np.isin(before, hashes)).sum())
    changes = []
    if len(new):
        verb = "row is" if len(new) == 1 else "rows are"
        changes.append(f"{len(new):,} {verb} new or changed, the first {train.origin(int(new[0]))}")
    if removed:
        changes.append(f"{removed:,} of its rows {'is' if removed == 1 else 'are'} missing")
    if not changes:
        same = np.array_equal(np.sort(hashes), np.sort(before))
        changes.append("the same rows, reordered" if same else "the same rows, cut differently")
    return "; ".join(changes)
