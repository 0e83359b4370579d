"""A recipe of another tool enters; a lorakit recipe and an account of every key leave: import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.base import Json, app, log, print_json
from lorakit.errors import RecipeError


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A recipe of Axolotl, LLaMA-Factory, TRL ...")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe to write; default: stdout.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Translate another tool's recipe; exit 1 if something in it has no match here."""
    from lorakit.recipe_import.translate import import_recipe
    from lorakit.recipe_import.write import as_dict, recipe_text, show_import

    found = import_recipe(source)
    if output:
        _write_new(output, recipe_text(found))
    elif not as_json:
        sys.stdout.write(recipe_text(found))
    if as_json:
        print_json(as_dict(found))
    else:
        show_import(found, log, str(output) if output else None)
    raise typer.Exit(1 if found.left else 0)


def _write_new(path: Path, text: str) -> None:
    """A recipe that is there already may have been worked on: it is never overwritten."""
    try:
        handle = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w")
    except FileExistsError:
        raise RecipeError(
            f"{path}: there already, and not overwritten", hint="give another name with -o"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be written: {error.strerror}", hint="give another place with -o"
        ) from error
    try:
        with handle:
            handle.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RecipeError(
            f"{path}: cannot be written: {error.strerror}", hint="give another place with -o"
        ) from error
