"""Public API of lorakit; names are loaded on first use, so that the import is fast.

    run = lorakit.finetune(model="demo", data="my.jsonl")
    run.chat("a question")

No module of the package has the name of a public function, since importing it would replace the
function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.api import finetune, inspect, plan, prepare, sweep
    from lorakit.engine.decoder_forward import accelerate
    from lorakit.errors import LorakitError
    from lorakit.hardware import detect_device
    from lorakit.recipe.loader import ResolvedRecipe, load_recipe, recipe_schema
    from lorakit.recipe.schema import Recipe
    from lorakit.results import Evaluation, Inspected, Plan
    from lorakit.run import Run, open_run
    from lorakit.sweeps.sweep import Sweep
    from lorakit.web.server import ui

_MODULES = {
    "Evaluation": "results",
    "Inspected": "results",
    "LorakitError": "errors",
    "Plan": "results",
    "Recipe": "recipe.schema",
    "ResolvedRecipe": "recipe.loader",
    "Run": "run",
    "Sweep": "sweeps.sweep",
    "accelerate": "engine.decoder_forward",
    "detect_device": "hardware",
    "finetune": "api",
    "inspect": "api",
    "load_recipe": "recipe.loader",
    "open_run": "run",
    "plan": "api",
    "prepare": "api",
    "recipe_schema": "recipe.loader",
    "sweep": "api",
    "ui": "web.server",
}
__all__ = [
    "Evaluation",
    "Inspected",
    "LorakitError",
    "Plan",
    "Recipe",
    "ResolvedRecipe",
    "Run",
    "Sweep",
    "accelerate",
    "detect_device",
    "finetune",
    "inspect",
    "load_recipe",
    "open_run",
    "plan",
    "prepare",
    "recipe_schema",
    "sweep",
    "ui",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"lorakit.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
