"""What the steps of a run hang on enters; a record that each checkpoint carries leaves.

A resume compares it with what it finds now: going on with other data, another rate or another rank
would end in an adapter that no recipe describes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorakit.data.ids import tokenizer_key
from lorakit.data.shelf import Examples
from lorakit.errors import RunError
from lorakit.recipe import Recipe
from lorakit.run_dir import RunDir

# Settings that do not alter the steps already taken. Model and data are compared by content; a
# micro-batch may shrink when memory ran out, as long as a step has the same examples.
FREE = {
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
    "streaming",
    "sharding",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "log_every",
    "report_to",
    "offline",
    "probe",
    "trust_remote_code",
}
VERSIONS = ("lorakit", "torch", "transformers", "peft", "trl", "datasets", "bitsandbytes")


def past_of(recipe: Recipe, train: Examples, tokenizer: Any, ranks: int = 1) -> dict[str, Any]:
    """The record, of JSON values; nothing in it names a place on this machine."""
    settings = recipe.model_dump(mode="json")
    return {
        "settings": {key: settings[key] for key in sorted(settings.keys() - FREE)},
        "examples per step": recipe.examples_per_step,
        "data": {
            "sha256": train.digest(),
            "examples": len(train),
            "tokens": int(train.lengths.sum()),
        },
        "tokenizer": tokenizer_key(tokenizer),
        "versions": versions(),
        "ranks": ranks,
    }


def versions() -> dict[str, str | None]:
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
    np.save(run.rows, train.marks)


def refuse_changed_past(
    run: RunDir, before: Mapping[str, Any], now: Mapping[str, Any], train: Examples
) -> None:
    """Compare the past of a checkpoint with what a resume finds.

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


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
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
    marks = train.marks
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
