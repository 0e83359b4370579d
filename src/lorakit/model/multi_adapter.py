"""One base model with the adapters of several runs, switched by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, RunError
from lorakit.model.base_fingerprint import check_base
from lorakit.model.load import LoadedRun, load_run, load_tokenizer, locate_model, public_name
from lorakit.model.untrusted import check_adapter
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir

FIRST = "default"


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One adapter: its public name, peft's name for it, its tokenizer and system prompt."""

    name: str
    slot: str
    tokenizer: Any
    system: str | None


@dataclass
class MultiAdapterModel:
    """One base with the adapters of several runs on it; one is active at a time."""

    loaded: LoadedRun
    tuned: dict[str, LoadedAdapter] = field(default_factory=dict)
    active: str = ""

    @classmethod
    def of(cls, run: RunDir, others: tuple[RunDir, ...] = ()) -> MultiAdapterModel:
        """Load the base once, and the adapter of each run.

        Raises:
            ModelError: a run has another base, or its adapter cannot share one.
        """
        loaded = load_run(run)
        name = run.path.resolve().name
        first = LoadedAdapter(name, FIRST, loaded.tokenizer, loaded.recipe.system)
        several = cls(loaded, {name: first}, name)
        for other in others:
            several.add(other)
        several.switch(name)
        return several

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def base_name(self) -> str:
        return public_name(self.loaded.recipe.model)

    def switch(self, name: str) -> LoadedAdapter:
        """Activate the adapter of this name, in a few milliseconds and without copying weights."""
        adapter = self.tuned[name]
        if self.active != name:
            self.model.set_adapter(adapter.slot)
            # peft marks the active adapter as trainable.
            self.model.requires_grad_(False)
            self.active = name
        return adapter

    def add(self, run: RunDir) -> str:
        """Load one more adapter and return its name.

        Raises:
            RunError: a run of this name is already loaded.
            ModelError: it has another base or method, or trained biases or complete modules.
        """
        name = run.path.resolve().name
        if name in self.tuned:
            raise RunError(f"{run.path}: an adapter named {name} is already loaded")
        recipe, first_recipe = load_recipe(run.recipe).recipe, self.loaded.recipe
        base = locate_model(recipe, [run.path, Path()])
        first_base = locate_model(first_recipe, [self.loaded.run.path, Path()])
        if base != first_base or recipe.method != first_recipe.method:
            raise ModelError(
                f"{run.path}: trained on {public_name(recipe.model)} ({recipe.method}), not on "
                f"{self.base_name} ({first_recipe.method})",
                hint="adapters that share a model need the same base and method",
            )
        check_base(run, recipe, base)
        kinds = [r.expert_adapters for r in (recipe, first_recipe)]
        if kinds.count("all") == 1:
            raise ModelError(
                f"{run.path}: expert_adapters: {kinds[0]}, but the first adapter has {kinds[1]}",
                hint="serve this run alone",
            )
        if recipe.bias != "none" or recipe.modules_to_save or recipe.trainable_tokens:
            raise ModelError(
                f"{run.path}: it trained biases, modules or tokens, which cannot be switched",
                hint="serve this run alone",
            )
        inner = self.model.get_base_model().named_modules()
        check_adapter(run.adapter, [name for name, _ in inner if name])
        self.model.load_adapter(str(run.adapter), adapter_name=f"run_{len(self.tuned)}")
        tokenizer = load_tokenizer(recipe, str(run.adapter))
        self.tuned[name] = LoadedAdapter(name, f"run_{len(self.tuned)}", tokenizer, recipe.system)
        self.model.eval()
        return name
