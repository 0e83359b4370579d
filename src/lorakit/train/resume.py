"""A resolved recipe enters; the run directory it may write into, and where to go on, leave.

What the steps of a run hang on enters; a record that each checkpoint carries leaves.

A resume compares it with what it finds now: going on with other data, another rate or another rank
would end in an adapter that no recipe describes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorakit.data.dataset import Examples
from lorakit.data.tokenize.batch_tokenizer import tokenizer_key
from lorakit.errors import RunError, WorkError
from lorakit.model.load import public_name
from lorakit.recipe.loader import ResolvedRecipe
from lorakit.recipe.schema import RENAMED, Recipe
from lorakit.storage.run_dir import RunDir, read_metrics, write_json, write_text
from lorakit.storage.run_lock import LOCK
from lorakit.train.checkpoint import Checkpoint, require_checkpoint
from lorakit.types import Device


def resolve_run_dir(resolved: ResolvedRecipe, resume: bool) -> tuple[RunDir, ResolvedRecipe]:
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
    run: RunDir, fingerprint: Mapping[str, Any], train: Examples, steps: int, console: Console
) -> Checkpoint | None:
    """The checkpoint to go on from; nothing is written yet.

    Args:
        fingerprint: see `run_fingerprint`.
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
    check_resume_compatible(run, found.facts["past"], fingerprint, train)
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
    for line in harmless_changes(found.facts["past"], fingerprint):
        console.print(f"note: {line}")
    return found


def truncate_metrics(run: RunDir, step: int) -> None:
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


# Settings that do not alter the steps already taken. Model and data are compared by content; a
# micro-batch may shrink when memory ran out, as long as a step has the same examples.
CHANGEABLE_ON_RESUME = {
    "model",
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
    "sharding",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "log_every",
    "report_to",
    "offline",
    "memory_probe",
    "trust_remote_code",
}
VERSIONS = ("lorakit", "torch", "transformers", "peft", "trl", "datasets", "bitsandbytes")


def run_fingerprint(
    recipe: Recipe, train: Examples, tokenizer: Any, ranks: int = 1
) -> dict[str, Any]:
    """The record, of JSON values; nothing in it names a place on this machine."""
    settings = recipe.model_dump(mode="json")
    return {
        "settings": {key: settings[key] for key in sorted(settings.keys() - CHANGEABLE_ON_RESUME)},
        "examples per step": recipe.examples_per_step,
        "data": {
            "sha256": train.digest(),
            "examples": len(train),
            "tokens": int(train.lengths.sum()),
        },
        "tokenizer": tokenizer_key(tokenizer),
        "versions": library_versions(),
        "ranks": ranks,
    }


def library_versions() -> dict[str, str | None]:
    """Installed versions of what decides a run's numbers."""
    found: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def remember_rows(run: RunDir, train: Examples) -> None:
    """Keep the content hash of each row, to say later which one changed."""
    np.save(run.rows, train.content_hashes)


def check_resume_compatible(
    run: RunDir, before: Mapping[str, Any], now: Mapping[str, Any], train: Examples
) -> None:
    """Compare the fingerprint in a checkpoint with what a resume finds.

    Raises:
        RunError: names everything that would alter the steps already taken.
    """
    lines = _changed_settings(before["settings"], now["settings"])
    if before["examples per step"] != now["examples per step"]:
        lines.append(
            f"micro_batch_size x gradient_accumulation_steps: was {before['examples per step']} "
            f"examples a step, is now {now['examples per step']}"
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
                "with: its rows come out otherwise",
                hint="bring that model folder back, or start a new run with --output",
            )
        was, seen = before["data"], now["data"]
        raise RunError(
            f"{run.path}: the data is not what this run trained on: {_changed_rows(run, train)}\n"
            f"  then {was['examples']:,} examples, {was['tokens']:,} tokens, "
            f"sha256 {was['sha256'][:12]}; now {seen['examples']:,}, {seen['tokens']:,}, "
            f"{seen['sha256'][:12]}",
            hint="bring the data back as it was, or start a new run with --output",
        )


def harmless_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines on what is not as it was and alters no step taken, but may be worth knowing."""
    lines = []
    was, seen = before["versions"], now["versions"]
    changed = [f"{n} {was.get(n)} -> {v}" for n, v in seen.items() if was.get(n) != v]
    if changed:
        lines.append(f"other versions than before: {', '.join(changed)}")
    ranks = before.get("ranks", 1), now.get("ranks", 1)
    if ranks[0] != ranks[1]:
        lines.append(
            f"{ranks[0]} rank{'s' * (ranks[0] > 1)} before, {ranks[1]} now: each step has the same "
            "examples; dropout masks are drawn otherwise"
        )
    if before["tokenizer"] != now["tokenizer"]:
        # A newer tokenizers package may write the same tokenizer down in other words.
        lines.append("the tokenizer's files differ; the training rows come out the same")
    return lines


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before = {RENAMED.get(key, key): value for key, value in before.items()}
    # A setting that an older version did not know had its default's effect.
    was = {
        key: before.get(key, Recipe.model_fields[key].get_default(call_default_factory=True))
        for key in now
    }
    return [f"{key}: was {was[key]!r}, is now {now[key]!r}" for key in now if was[key] != now[key]]


def _changed_rows(run: RunDir, train: Examples) -> str:
    try:
        before = np.load(run.rows, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return f"({run.rows.name} is gone, so the rows cannot be named)"
    marks = train.content_hashes
    fresh = np.flatnonzero(~np.isin(marks, before))
    gone = int((~np.isin(before, marks)).sum())
    said = []
    if len(fresh):
        one = "row is" if len(fresh) == 1 else "rows are"
        said.append(f"{len(fresh):,} {one} new or changed, the first {train.origin(int(fresh[0]))}")
    if gone:
        said.append(f"{gone:,} of its rows {'is' if gone == 1 else 'are'} not there any more")
    if not said:
        same = np.array_equal(np.sort(marks), np.sort(before))
        said.append("the same rows in another order" if same else "the same rows, otherwise cut")
    return "; ".join(said)
