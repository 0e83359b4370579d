"""Commands before a run: inspect, bench, schema.

Heavy imports are inside the commands, so that `lorakit --help` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.app import (
    Gpus,
    Json,
    Offline,
    Set,
    app,
    first_rank,
    log,
    on_gpus,
    out,
    print_json,
)
from lorakit.console import quiet
from lorakit.errors import RecipeError


@app.command()
def inspect(
    source: Annotated[
        list[str], typer.Argument(metavar="DATA", help="Files or hub data sets, or a recipe.yaml.")
    ],
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or `demo`.")] = None,
    set_: Set = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples to show token by token.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Also write it as one HTML page.")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show the trained tokens of examples and every fault of the data. Loads no weights."""
    from lorakit.recipe.loader import load_recipe

    recipe = Path(source[0]) if source[0].endswith((".yaml", ".yml")) else None
    flags: dict[str, Any] = {"model": model, "offline": True if offline else None}
    if recipe is None or len(source) > 1:
        flags["data"] = source[0] if len(source) == 1 else source[recipe is not None :]
    resolved = load_recipe(recipe, set_ or [], flags)
    quiet(resolved.recipe.offline)
    from lorakit.api import inspect as inspect_data

    inspection = inspect_data(resolved, examples=examples, say=log.print)
    if html:
        from lorakit.report.html import write_inspection

        write_inspection(inspection, html)
    if as_json:
        print_json(inspection.as_dict())
    else:
        out.print(inspection)
    if html:
        log.print(f"page     {html}")
    raise typer.Exit(1 if inspection.stopping else 0)


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="Model shape, such as llama-2-7b.")] = "llama-2-7b",
    method: Annotated[str, typer.Option(help="lora or qlora.")] = "lora",
    seq: Annotated[int, typer.Option(min=8, help="Tokens per example.")] = 2048,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps, first ones untimed.")] = 8,
    lengths: Annotated[str, typer.Option(help="fixed, or mixed like instruction data.")] = "fixed",
    gpus: Gpus = None,
    set_: Set = None,
    id_: Annotated[str | None, typer.Option("--id", help="Label for the result.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """Measure tokens/s and peak memory with random weights, without a download; print JSON."""
    quiet(offline=True)
    if gpus and gpus > 1:
        on_gpus(gpus)
    first = first_rank()
    from lorakit.bench import run_bench
    from lorakit.storage.run_dir import write_json

    if lengths not in ("fixed", "mixed"):
        raise RecipeError(f"--lengths {lengths}: unknown", hint="fixed or mixed")
    result = run_bench(
        shape, method, seq, micro_batch, accumulation, steps, set_ or [], id_, log, lengths
    )
    if not first:
        return
    if output:
        write_json(output, result)
    print_json(result)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from lorakit.recipe.loader import recipe_schema

    print_json(recipe_schema())
