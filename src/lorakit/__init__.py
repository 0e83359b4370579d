"""The public door of lorakit: names load on first use, so importing the package costs no torch.

from lorakit import Recipe, load_recipe, fit
"""

from __future__ import annotations

from typing import Any

_WHERE = {
    "EvalResult": "records",
    "LorakitError": "errors",
    "Recipe": "recipe",
    "RunDir": "run_dir",
    "detect_device": "hardware",
    "fit": "finetune",
    "load_recipe": "recipe_file",
    "load_run": "model.load",
    "open_run": "run_dir",
    "prepare_run": "finetune",
    "recipe_schema": "recipe_file",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"lorakit.{_WHERE[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
