"""Train several adapters on one base: `lorakit sweep`.

Heavy imports are inside the command, so that `lorakit --help` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.app import (
    KEYS_AS_WORDS,
    Json,
    Method,
    Offline,
    Set,
    app,
    log,
    out,
    print_json,
    recipe_and_overrides,
    recipe_flags,
)
from lorakit.console import quiet
from lorakit.errors import RecipeError

if TYPE_CHECKING:
    from lorakit.sweeps.run_sweep import SweepResult
    from lorakit.sweeps.sweep_plan import SweepRequest


@app.command(context_settings=KEYS_AS_WORDS)
def sweep(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML); with --resume the sweep's folder.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES", help="Values to combine: 5e-5,1e-4, or a range: 1e-5..1e-3."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each combination.")] = 1,
    halving: Annotated[
        bool, typer.Option("--halving", help="Stop the worse half after parts of the steps.")
    ] = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Combinations that Optuna proposes, for ranges.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Show runs, memory, disk; train nothing.")
    ] = False,
    set_: Set = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or `demo`.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File or hub data set; repeatable.")
    ] = None,
    method: Method = None,
    output: Annotated[str | None, typer.Option(help="Folder of the sweep.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a sweep; failed runs are tried again.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train even if a plan does not fit into memory.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Train several adapters on one frozen base and compare them; each is a normal run."""
    from lorakit.recipe.loader import load_recipe
    from lorakit.sweeps.variations import read_vary

    flags = recipe_flags(model, data, method, output, offline)
    recipe, overrides = recipe_and_overrides(context, recipe, set_)
    varied = read_vary(vary or [])
    if resume:
        if overrides or model or data or method:
            raise RecipeError(
                "--resume: a sweep's settings are in its folder and cannot be changed",
                hint="give only the folder: lorakit sweep FOLDER --resume",
            )
        _resume(Path(output) if output else recipe, offline, force, as_json, varied)
    resolved = load_recipe(recipe, overrides, flags)
    quiet(resolved.recipe.offline)
    from lorakit.sweeps.run_sweep import start_sweep
    from lorakit.sweeps.sweep_plan import SweepRequest

    request = SweepRequest(resolved, varied, seeds, halving, trials)
    if plan:
        _show_plan(request, as_json)
        return
    _show(start_sweep(request, log, force), as_json)


def _resume(
    folder: Path | None, offline: bool, force: bool, as_json: bool, varied: dict[str, Any]
) -> None:
    """Continue a sweep, print its outcome, and exit with its code."""
    if folder is None or folder.is_file():
        raise RecipeError(
            "--resume needs the folder of a sweep", hint="lorakit sweep FOLDER --resume"
        )
    quiet(offline)
    from lorakit.sweeps.run_sweep import resume_sweep

    _show(resume_sweep(folder, log, force, varied or None), as_json)


def _show_plan(request: SweepRequest, as_json: bool) -> None:
    from lorakit.sweeps.sweep_plan import plan_sweep
    from lorakit.sweeps.sweep_view import sweep_plan_view

    planned = plan_sweep(request, log, force=True)
    if as_json:
        print_json(planned.as_dict())
    else:
        out.print(sweep_plan_view(planned, request))
    raise typer.Exit(0 if planned.largest.plan.fits else 1)


def _show(result: SweepResult, as_json: bool) -> None:
    """Print the outcome, and exit with the sweep's code."""
    from lorakit.results import program
    from lorakit.storage.run_dir import pasted
    from lorakit.sweeps.sweep import run_row
    from lorakit.sweeps.sweep_view import sweep_view

    record, folder = result.record, result.folder
    best = record.best()
    if as_json:
        print_json(
            {
                "sweep": str(folder.path),
                "best": None if best is None else str(folder.run(best.name).path),
                "runs": [run_row(run) for run in record.runs],
            }
        )
    else:
        out.print(sweep_view(record))
    shown = log if as_json else out
    if folder.page.exists():
        shown.print(f"page     {folder.page}", soft_wrap=True)
    if result.exit_code:
        words = [program(), "sweep", pasted(folder.path), "--resume"]
        shown.print(f"resume with: {' '.join(words)}", soft_wrap=True)
    elif best is not None:
        shown.print("next:")
        shown.print(f"  {folder.run(best.name).command('chat', program=program())}", soft_wrap=True)
    raise typer.Exit(result.exit_code)
