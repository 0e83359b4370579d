"""Tables of a sweep for the terminal: its plan, and its runs with their held-out losses."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakit.storage.atomic_dir import megabytes
from lorakit.storage.units import GIB
from lorakit.sweeps.sweep_plan import SweepPlan, SweepRequest
from lorakit.sweeps.sweep_record import SweepRecord
from lorakit.sweeps.variations import show_value


def sweep_plan_view(plan: SweepPlan, request: SweepRequest) -> RenderableType:
    """Show the runs of a sweep, their steps, and the memory and disk that they need."""
    searched = request.trials is not None
    keys = list(dict.fromkeys(key for p in plan.runs for key in p.run.settings))
    table = Table(title="the ends of the ranges" if searched else "runs")
    for column in ("run", *keys, "steps", "memory GiB"):
        right = column in ("steps", "memory GiB")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for p in plan.runs:
        values = [show_value(p.run.settings.get(key, "")) for key in keys]
        memory = f"{p.plan.total_bytes / GIB:.2f}"
        table.add_row(p.run.name, *values, f"{p.steps:,}", memory)
    largest = plan.largest.plan
    frozen = sum(largest.parts.get(n, 0) for n in ("frozen weights", "embeddings, head and norms"))
    own = ("adapters (float32)", "gradients (float32)", "optimizer state")
    adapter = sum(largest.parts.get(name, 0) for name in own)
    steps = f"{plan.steps:,} steps in all"
    if request.halving:
        steps += f" instead of {plan.full_steps:,}, by halving"
    fits = "it fits" if largest.fits else "IT DOES NOT FIT"
    lines = [
        f"runs     {plan.count}, one after the other on one base; {steps}",
        f"memory   {largest.total_bytes / GIB:.2f} GiB for the largest run, "
        f"{largest.available_bytes / GIB:.2f} GiB here: {fits}",
        f"         the base once {frozen / GIB:.2f}, one adapter with gradients and optimizer "
        f"{adapter / GIB:.2f}",
        f"disk     {megabytes(plan.disk_bytes)} for checkpoints and adapters",
    ]
    if speed := plan.first.tokens_per_second:
        tokens = plan.first.prepared.report.tokens_train
        examples = max(1, len(plan.first.prepared.train))
        per_step = tokens / examples * plan.first.resolved.recipe.examples_per_step
        lines.append(f"time     about {plan.steps * per_step / speed / 60:,.0f} min of training")
    if not plan.comparable:
        lines.append("note     held-out losses are of different rows, or none: no run is the best")
    return Group(table, Text("\n".join(lines)))


def sweep_view(record: SweepRecord) -> RenderableType:
    """Show the runs of a sweep with their held-out losses, best configuration first."""
    keys = list(dict.fromkeys(key for run in record.runs for key in run.settings))
    best = record.best()
    table = Table()
    for column in ("run", *keys, "step", "held-out loss", "state"):
        right = column in ("step", "held-out loss")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    order = {number: place for place, (_, number) in enumerate(record.ranking())}
    ranked = sorted(record.runs, key=lambda run: order.get(run.configuration, len(order)))
    for run in ranked if record.comparable else record.runs:
        losses = [run.held_out, *reversed(run.rungs.values())]
        loss = next((value for value in losses if value is not None), None)
        table.add_row(
            f"{run.name} *" if run is best else run.name,
            *(show_value(run.settings.get(key, "")) for key in keys),
            f"{run.step:,}",
            "" if loss is None else f"{loss:.4f}",
            run.state,
        )
    lines = []
    if best is not None:
        runs = record.configurations()[best.configuration]
        seeds = f", mean of {len(runs)} seeds {record.ranking()[0][0]:.4f}" if runs[1:] else ""
        lines.append(f"best     {best.name} *: held-out loss {best.held_out:.4f}{seeds}")
    elif not record.comparable:
        lines.append("best     not known: the held-out losses are of different rows, or none")
    lines += [f"{run.state:8} {run.name}: {run.reason}" for run in ranked if run.reason]
    return Group(table, Text("\n".join(lines))) if lines else table
