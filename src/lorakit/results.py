"""Results of plan, inspect and evaluate: records that print and display themselves.

In a terminal, a notebook and `print` each shows the same view; its data stays reachable.

What a run is about to do, or has done, enters; tables and the next commands to type leave.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.table import Table

from lorakit.data.inspection import Inspection, Shown
from lorakit.display.evaluation_view import evaluation_view
from lorakit.display.inspection_view import example_view, inspection_view, render_example
from lorakit.display.plan_view import plan_view
from lorakit.display.rich_output import Displayed
from lorakit.pipeline import PreparedRun, TrainResult
from lorakit.planning.forecast import Forecast
from lorakit.types import EvalResult, MemoryPlan


class Plan(Displayed, Forecast):
    """Whether a run fits, and what it takes; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Forecast) -> Self:
        """The same record, able to display itself."""
        return cls(**_values(found))

    def __rich__(self) -> RenderableType:
        return plan_view(self)


class InspectedExample(Displayed, Shown):
    """One example; trained tokens are between ⟦ and ⟧."""

    __slots__ = ()

    def __rich__(self) -> RenderableType:
        return example_view(self)


class Inspected(Displayed, Inspection):
    """What will be trained; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Inspection) -> Self:
        """The same record, able to display itself; so is each example in `shown`."""
        shown = tuple(InspectedExample(**_values(example)) for example in found.shown)
        return cls(**{**_values(found), "shown": shown})

    def __rich__(self) -> RenderableType:
        return inspection_view(self)


class Evaluation(Displayed, EvalResult):
    """Base against tuned; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: EvalResult) -> Self:
        """The same record, able to display itself."""
        return cls(**_values(found))

    def __rich__(self) -> RenderableType:
        return evaluation_view(self)


def _values(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


SHOWN_EXAMPLES = 3


def show_prologue(start: PreparedRun, console: Console, as_json: bool) -> None:
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


def show_outcome(outcome: TrainResult, console: Console, next_steps: bool) -> None:
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
