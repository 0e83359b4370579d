"""A recipe enters; what a run would train on leaves, seen before a weight is loaded.

Reads the data and the model's tokenizer, nothing else of the model, on any machine.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lorakit.data.inspection import Inspection, inspect_prepared
from lorakit.data.prepare import prepare
from lorakit.model.load import load_config, load_tokenizer, locate_model, public_name
from lorakit.recipe_file import ResolvedRecipe


def inspect_data(resolved: ResolvedRecipe, console: Console, count: int = 3) -> Inspection:
    """Prepare the data as `train` does, counting what would spoil a run instead of stopping.

    Args:
        count: examples to show token by token.

    Raises:
        LorakitError: the model or a source cannot be read, or no row can be used.
    """
    recipe = resolved.recipe
    folders = [Path(), *([resolved.folder] if resolved.folder else [])]
    location = locate_model(recipe, folders, console.print)
    load_config(recipe, location)
    tokenizer = load_tokenizer(recipe, location)
    prepared = prepare(recipe, tokenizer, folders, inspecting=True)
    return inspect_prepared(prepared, tokenizer, recipe, public_name(recipe.model), count)
