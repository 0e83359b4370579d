"""Recipes of measured rows in benchmarks/results, which keep the key names of their time."""

from lorakit.recipe.schema import RENAMED, Recipe


def recipe_of(row, **changes):
    """The recipe of a row; its model and data are not needed."""
    values = {RENAMED.get(key, key): value for key, value in row["recipe"].items()}
    return Recipe(**{**values, "model": "m", "data": "d", **changes})
