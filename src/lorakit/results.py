"""Results of plan, inspect and evaluate that display themselves, and console output of a run.

A result shows the same view in a terminal, a notebook and `print`; its data are attributes.
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
    """Memory and speed forecast of a run; `as_dict()` returns plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Forecast) -> Self:
        """Copy the record with display methods."""
        return cls(**_values(found))

    def __rich__(self) -> RenderableType:
        return plan_view(self)


class InspectedExample(Displayed, Shown):
    """One example; trained tokens are between ⟦ and ⟧."""

    __slots__ = ()

    def __rich__(self) -> RenderableType:
        return example_view(self)


class Inspected(Displayed, Inspection):
    """Prepared data with examples and faults; `as_dict()` returns plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Inspection) -> Self:
        """Copy the record, and each example in `shown`, with display methods."""
        shown = tuple(InspectedExample(**_values(example)) for example in found.shown)
        return cls(**{**_values(found), "shown": shown})

    def __rich__(self) -> RenderableType:
        return inspection_view(self)


class Evaluation(Displayed, EvalResult):
    """Scores and answers of base and tuned; `as_dict()` returns plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: EvalResult) -> Self:
        """Copy the record with display methods."""
        return cls(**_values(found))

    def __rich__(self) -> RenderableType:
        return evaluation_view(self)


def _values(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


SHOWN_EXAMPLES = 3


def show_prologue(start: PreparedRun, console: Console, as_json: bool) -> None:
    """Print the resolved recipe with origins, the plan and rendered examples."""
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
    """Print the memory of each part, and the verdict."""
    table = Table(title="memory plan")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / 2**30:.2f}")
    table.add_row("sum", f"{plan.total_bytes / 2**30:.2f}")
    table.add_row("this device has", f"{plan.available_bytes / 2**30:.2f}")
    console.print(table)
    console.print("it fits" if plan.fits else "it does not fit")


def show_examples(tokenizer: Any, examples: Sequence[Any], console: Console) -> None:
    """Print examples with trained tokens in brackets."""
    console.print("examples as the model sees them; ⟦trained⟧")
    for example in examples:
        console.rule(str(example.origin))
        console.print(render_example(tokenizer, example))


def show_outcome(outcome: TrainResult, console: Console, next_steps: bool) -> None:
    """Print the result of a run, its files, and the next commands."""
    run = outcome.run
    if outcome.exit_code:
        console.print(f"stopped after step {outcome.steps}; a checkpoint was saved")
        command = outcome.run.going_on(outcome.ranks, program())
        console.print(f"resume with: {command}", soft_wrap=True)
        return
    if outcome.evaluation:
        console.print(evaluation_view(outcome.evaluation))
    else:
        console.print("no held-out rows: nothing was evaluated (val_size is 0)")
    console.print(f"trained {outcome.steps} steps in {outcome.train_seconds:.0f} s")
    if outcome.best:
        console.print(f"best     {outcome.best.describe()}")
    console.print(f"adapter  {outcome.run.adapter}  (PEFT format)", soft_wrap=True)
    if outcome.unfit:
        console.print(f"         only for AutoModelForCausalLM and lorakit: {outcome.unfit}")
    console.print(f"metrics  {outcome.run.metrics}", soft_wrap=True)
    if outcome.run.report.exists():
        console.print(f"report   {outcome.run.report}", soft_wrap=True)
    if next_steps:
        console.print("next:")
        form = "gguf" if outcome.unfit else "merged"
        for words in (("chat",), ("eval", "--data", "FILE.jsonl"), ("export", "--to", form)):
            console.print(f"  {run.command(*words, program=program())}", soft_wrap=True)


def program() -> str:
    """Command that starts lorakit here: its name if it is on the PATH, else the path used."""
    if shutil.which("lorakit") or not sys.argv[0].endswith("lorakit"):
        return "lorakit"
    return os.path.relpath(sys.argv[0])
