"""Predict memory and speed of a run: `lorakit plan`.

Heavy imports are inside the command, so that `lorakit --help` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.app import (
    KEYS_AS_WORDS,
    Json,
    Method,
    Offline,
    Set,
    app,
    out,
    print_json,
    recipe_and_overrides,
)
from lorakit.console import quiet


@app.command(context_settings=KEYS_AS_WORDS)
def plan(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML); flags and key=value may replace it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, or a name such as llama-2-7b.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Plan for this GPU: t4, 3060, 4090, a100-80, h100 ...")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Plan for a GPU with this much memory, such as 12GB.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of a node (torchrun's --nproc-per-node); default 1."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes, each with --gpus of them; default 1.")
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(metavar="GBIT", help="Network bandwidth of a node in Gbit/s; default 100."),
    ] = None,
    seq: Annotated[int | None, typer.Option(help="cutoff_len: tokens of the longest row.")] = None,
    method: Method = None,
    data: Annotated[list[str] | None, typer.Option(help="Not read; as in `train`.")] = None,
    set_: Set = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Predict if a run fits, its speed, and changes that make it fit. Loads no weights."""
    from lorakit.recipe.loader import load_recipe

    flags: dict[str, Any] = {"model": model, "method": method, "cutoff_len": seq}
    recipe, overrides = recipe_and_overrides(context, recipe, set_)
    flags["data"] = data or (None if recipe else "not read")
    flags["offline"] = True if offline else None
    resolved = load_recipe(recipe, overrides, flags)
    quiet(resolved.recipe.offline)
    from lorakit.api import plan as plan_recipe

    forecast = plan_recipe(
        resolved, gpu=gpu, memory=memory, gpus=gpus, nodes=nodes, network=network
    )
    if as_json:
        print_json(forecast.as_dict())
    else:
        out.print(forecast)
    raise typer.Exit(0 if forecast.fits else 1)
