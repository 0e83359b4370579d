"""Load the recipe of `lorakit demo`: SmolLM2-135M on data that ships with lorakit."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lorakit.recipe.loader import ResolvedRecipe, load_recipe


def demo_recipe(method: str, output: Path | None = None) -> ResolvedRecipe:
    """Load the recipe of `lorakit demo`, an ordinary YAML file in `assets/`."""
    path = Path(str(files("lorakit") / "assets" / "demo.yaml"))
    return load_recipe(path, flags={"method": method, "output_dir": output and str(output)})
