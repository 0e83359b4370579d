"""A method enters; the embedded default's recipe leaves: SmolLM2-135M on data that ships here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lorakit.recipe.loader import ResolvedRecipe, load_recipe


def demo_recipe(method: str, output: Path | None = None) -> ResolvedRecipe:
    """The recipe behind `lorakit demo`, an ordinary YAML file that ships in `assets/`."""
    path = Path(str(files("lorakit") / "assets" / "demo.yaml"))
    return load_recipe(path, flags={"method": method, "output_dir": output and str(output)})
