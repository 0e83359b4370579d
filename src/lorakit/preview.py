"""What a run is about to do, or has done, enters; tables and the next commands to type leave."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lorakit.display.evaluation import evaluation_view
from lorakit.display.inspection import render_example
from lorakit.fit import Outcome, Prologue
from lorakit.records import MemoryPlan

SHOWN_EXAMPLES = 3


def show_prologue(start: Prologue, console: Console, as_json: bool) -> None:
    """The resolved recipe with origins, the data, the plan and rendered examples."""
    if as_json:
        value = {
            "recipe": start.resolved.recipe.model_dump(mode="json"),
            "origins": start.resolved.origins,
            "data": start.prepared.report.as_dict(),
            "plan": start.plan_as_dict(),
        }
        console.file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        return
    table = Table(title="recipe")
    for column in ("key", "value", "origin"):
        table.add_column(column, overflow="fold")
    for key, value in start.resolved.recipe.model_dump(mode="json").items():
        table.add_row(key, json.dumps(value, ensure_ascii=False), start.resolved.origins[key])
    console.print(table)
    show_plan(start.plan, console)
    show_examples(start.tokenizer, start.prepared.train[:SHOWN_EXAMPLES], console)
    console.print("dry run: nothing was trained")


def show_plan(plan: MemoryPlan, console: Console) -> None:
    """Bytes per part and the verdict."""
    table = Table(title="memory plan")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in plan.parts.items():
        table.add_row(part, f"{size / 2**30:.2f}")
    table.add_row("sum", f"{plan.total_bytes / 2**30:.2f}")
    table.add_row("this device has", f"{plan.available_bytes / 2**30:.2f}")
    console.print(table)
    console.print("it fits" if plan.fits else "it does not fit as it stands")


def show_examples(tokenizer: Any, examples: Sequence[Any], console: Console) -> None:
    """Rendered examples; what lies between the brackets is trained."""
    console.print("examples as the model sees them; ⟦trained⟧")
    for example in examples:
        console.rule(str(example.origin))
        console.print(render_example(tokenizer, example))


def show_outcome(outcome: Outcome, console: Console, next_steps: bool) -> None:
    """How it went, where everything lies, and what to type next."""
    run = outcome.run.path
    if outcome.exit_code:
        console.print(f"stopped after step {outcome.steps}; a checkpoint was saved")
        command = outcome.run.going_on(outcome.ranks, program())
        console.print(f"go on with: {command}", soft_wrap=True)
        return
    if outcome.evaluation:
        console.print(evaluation_view(outcome.evaluation))
    else:
        console.print("no held-out rows: nothing was evaluated (val_size is 0)")
    console.print(f"trained {outcome.steps} steps in {outcome.train_seconds:.0f} s")
    console.print(f"adapter  {outcome.run.adapter}  (PEFT format)")
    if outcome.unfit:
        console.print(f"         for AutoModelForCausalLM and lorakit alone: {outcome.unfit}")
    console.print(f"metrics  {outcome.run.metrics}")
    if outcome.run.report.exists():
        console.print(f"report   {outcome.run.report}")
    if next_steps:
        console.print("next:")
        console.print(f"  {program()} chat {run}", soft_wrap=True)
        console.print(f"  {program()} eval {run} --data FILE.jsonl", soft_wrap=True)
        form = "gguf" if outcome.unfit else "merged"
        console.print(f"  {program()} export {run} --to {form}", soft_wrap=True)


def program() -> str:
    """What to type for this program here: its name if the shell finds it, else the path used."""
    if shutil.which("lorakit") or not sys.argv[0].endswith("lorakit"):
        return "lorakit"
    return os.path.relpath(sys.argv[0])
