"""Translate the recipe of another tool: `lorakit import`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.app import Json, app, log, print_json
from lorakit.errors import RecipeError

if TYPE_CHECKING:
    from lorakit.recipe.importers.rules import Imported


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
    """Translate another tool's recipe; exit 1 if a key of it has no equivalent."""
    from lorakit.recipe.importers.convert import as_dict, import_recipe, recipe_text

    imported = import_recipe(source)
    if output:
        _write_new(output, recipe_text(imported))
    elif not as_json:
        sys.stdout.write(recipe_text(imported))
    if as_json:
        print_json(as_dict(imported))
    else:
        log.print("\n".join(_report(imported, output)))
    raise typer.Exit(1 if imported.left else 0)


def _report(imported: Imported, output: Path | None) -> Iterator[str]:
    """Yield a line for each key, untranslated ones last."""
    not_needed: dict[str, list[str]] = {}
    keys = [line for line in imported.lines.values() if line.status != "default"]
    yield f"{imported.path.name}: a recipe of {imported.tool.name}, {len(keys)} keys"
    yield "\ntranslated"
    for key, line in imported.lines.items():
        if line.status == "not_needed":
            not_needed.setdefault(line.note, []).append(key)
        elif line.status == "translated" or (line.status == "default" and line.values):
            yield f"  {key} -> {line.here}{f'  ({line.note})' if line.note else ''}"
    yield "\nnot needed, or done by lorakit itself"
    for note, names in not_needed.items():
        yield f"  {', '.join(names)}: {note}"
    if imported.left:
        yield "\nNOT translated: the run will differ"
    for key, note in imported.left.items():
        yield f"  {key}: {note}"
    count = len(imported.left)
    end = f"{count} key{'' if count == 1 else 's'} not translated" if count else "all translated"
    check = shlex.join(["lorakit", "train", str(output), "--dry-run"])
    written = f"; written to {output}. Check it: {check}" if output else ""
    yield f"\n{end}{written}"


def _write_new(path: Path, text: str) -> None:
    """Write a new file; an existing recipe may have been edited and is never overwritten."""
    created = False
    try:
        with path.open("x", encoding="utf-8") as handle:
            created = True
            handle.write(text)
    except FileExistsError:
        raise RecipeError(f"{path}: already exists", hint="set another name with -o") from None
    except OSError as error:
        if created:
            path.unlink(missing_ok=True)
        raise RecipeError(
            f"{path}: cannot be written: {error.strerror}", hint="set another path with -o"
        ) from error
