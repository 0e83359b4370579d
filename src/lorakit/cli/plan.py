"""A recipe or a model's name enters; whether it fits, and what would make it, leaves: plan.

Heavy imports live inside the command, so that `lorakit --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.app import Json, Method, Offline, Set, app, out, print_json, quiet


@app.command()
def plan(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML); flags may replace it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, or a name such as llama-2-7b.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Plan for this card: t4, 3060, 4090, a100-80, h100 ...")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Plan for a card of this memory, such as 12GB.")
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
        typer.Option(metavar="GBIT", help="What a node's network carries a second; default 100."),
    ] = None,
    seq: Annotated[int | None, typer.Option(help="cutoff_len: tokens of the longest row.")] = None,
    method: Method = None,
    data: Annotated[list[str] | None, typer.Option(help="Not read; as in `train`.")] = None,
    set_: Set = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say whether a run fits, how fast it will be, and what would make it fit. Loads no weights."""
    from lorakit.recipe.loader import load_recipe

    flags: dict[str, Any] = {"model": model, "method": method, "cutoff_len": seq}
    flags["data"] = data or (None if recipe else "not read")
    flags["offline"] = True if offline else None
    resolved = load_recipe(recipe, set_ or [], flags)
    quiet(resolved.recipe.offline)
    from lorakit.api import plan as plan_recipe

    found = plan_recipe(resolved, gpu=gpu, memory=memory, gpus=gpus, nodes=nodes, network=network)
    if as_json:
        print_json(found.as_dict())
    else:
        out.print(found)
    raise typer.Exit(0 if found.fits else 1)
