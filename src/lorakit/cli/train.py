"""Commands that train: demo, train.

Heavy imports are inside the commands, so that `lorakit --help` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.app import (
    KEYS_AS_WORDS,
    Gpus,
    Json,
    Method,
    Offline,
    Output,
    Set,
    app,
    first_rank,
    log,
    on_gpus,
    out,
    print_json,
    recipe_and_overrides,
    recipe_flags,
)
from lorakit.console import quiet


@app.command()
def demo(method: Method = "lora", output: Output = None, as_json: Json = False) -> None:
    """Fine-tune a real small chat model on this CPU, in minutes, and show what changed."""
    from lorakit.recipe.demo import demo_recipe

    run_training(
        demo_recipe(method or "lora", output), resume=False, as_json=as_json, next_steps=True
    )


@app.command("sft", hidden=True, context_settings=KEYS_AS_WORDS)
@app.command(context_settings=KEYS_AS_WORDS)
def train(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML); flags and key=value may replace it.")
    ] = None,
    set_: Set = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or `demo`.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File or hub data set; repeatable.")
    ] = None,
    method: Method = None,
    output: Annotated[str | None, typer.Option(help="Run directory.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and plan the run without training.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if the plan does not fit into memory.")
    ] = False,
    gpus: Gpus = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model with a recipe and flags, and write a run directory."""
    from lorakit.recipe.loader import load_recipe

    flags = recipe_flags(model, data, method, output, offline)
    recipe, overrides = recipe_and_overrides(context, recipe, set_)
    resolved = load_recipe(recipe, overrides, flags)
    if gpus and gpus > 1 and not dry_run:
        on_gpus(gpus)
    if dry_run:
        quiet(resolved.recipe.offline)
        from lorakit.pipeline import prepare_run
        from lorakit.results import show_prologue

        show_prologue(prepare_run(resolved, log, gpus=gpus), out, as_json)
        return
    run_training(resolved, resume, as_json, next_steps=True, force=force)


def run_training(
    resolved: Any, resume: bool, as_json: bool, next_steps: bool, force: bool = False
) -> None:
    """Train, print the outcome, and exit with the run's code."""
    quiet(resolved.recipe.offline)
    first = first_rank()
    from lorakit.pipeline import fit
    from lorakit.results import show_outcome

    outcome = fit(resolved, log, resume, force)
    if not first:
        raise typer.Exit(outcome.exit_code)
    show_outcome(outcome, log if as_json else out, next_steps and not as_json)
    if as_json:
        print_json(
            {
                "run": str(outcome.run.path),
                "steps": outcome.steps,
                "train_seconds": round(outcome.train_seconds, 2),
                "final_loss": outcome.final_loss,
                **(outcome.evaluation.as_dict() if outcome.evaluation else {}),
            }
        )
    raise typer.Exit(outcome.exit_code)
