"""Start training from an existing adapter: find it, and take its settings over.

`from_adapter` or `model` may name a run, the `adapter` folder of a run, one of its checkpoints, or
any LoRA adapter in PEFT's format. The adapter's own settings (rank, targets, ...) become those of
the recipe; a recipe that sets another value is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, RecipeError, RunError
from lorakit.model.lora_config import SUPPORTED_FIELDS
from lorakit.model.untrusted import read_object
from lorakit.recipe.aliases import LORA_KEYS
from lorakit.recipe.loader import ResolvedRecipe, load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir, read_json

CONFIG = "adapter_config.json"
EXPERT_WEIGHTS = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
# Keys of the recipe by their names in adapter_config.json.
KEYS = {name: key for name, key in LORA_KEYS.items() if name != "lora_dropout"}
# Not part of what is trained, or written by other versions.
NEUTRAL = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "lora_dropout", "megatron_core", "megatron_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("ensure_weight_tying", "layers_pattern"),
}
# Schemes that changed the base in a way that cannot be repeated exactly.
UNREPEATABLE = ("corda", "lora_ga", "loftq", "pissa_niter")


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """An adapter to start from; `run` is the run that it belongs to, if any."""

    folder: Path
    run: RunDir | None
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Path for messages: that of the run, if the adapter is its result."""
        finished = self.run is not None and self.folder.name == "adapter"
        return str(self.run.path if finished and self.run else self.folder)

    def trained_on(self) -> str:
        """Name the data of the run that made the adapter, for messages."""
        if self.run is None:
            return ""
        return f", trained on {', '.join(load_recipe(self.run.recipe).recipe.sources)}"

    def record(self) -> dict[str, Any]:
        """Describe where the adapter came from, for `start.json` of the new run.

        Holds the recipe, the data report and the start of the run that made it, so that the record
        of all data stays if that run is deleted.
        """
        found: dict[str, Any] = {
            "adapter": Path(self.name).name,
            "folder": self.folder.name,
            "sha256": weights_sha256(self.folder),
        }
        if self.run is not None:
            recipe = load_recipe(self.run.recipe).recipe
            found["recipe"] = recipe.model_dump(mode="json")
            found["data"] = read_json(self.run.data_report)
            found["start"] = read_json(self.run.start)
        return {key: value for key, value in found.items() if value}


def find_start(recipe: Recipe, folders: Sequence[Path] = (Path(),)) -> StartAdapter | None:
    """Find the adapter that a recipe starts from; None if it starts a new one.

    Raises:
        RecipeError: both `model` and `from_adapter` name an adapter.
        ModelError: `from_adapter` is not a LoRA adapter.
        RunError: the run has no adapter yet.
    """
    of_model = _adapter_at(recipe.model, folders)
    if recipe.from_adapter is None:
        return of_model
    if of_model is not None and recipe.model != recipe.from_adapter:
        raise RecipeError(
            f"model: {recipe.model} is an adapter, and from_adapter names {recipe.from_adapter}",
            hint="name the adapter in from_adapter, and leave model out or name the base",
        )
    found = _adapter_at(recipe.from_adapter, folders)
    if found is None:
        raise ModelError(
            f"from_adapter: {recipe.from_adapter}: no adapter here",
            hint="give a run, its adapter folder, one of its checkpoints, or a local folder with "
            f"{CONFIG}",
        )
    return found


def resolve_start(resolved: ResolvedRecipe, resume: bool = False) -> ResolvedRecipe:
    """Take over base, method and adapter settings from the adapter that the recipe starts from.

    Args:
        resume: the run's own recipe has all settings, and the adapter may be gone.

    Raises:
        RecipeError: the recipe sets a value that differs from the adapter's.
        ModelError, RunError: see `find_start`.
    """
    recipe = resolved.recipe
    folders = resolved.folders
    if resume and recipe.from_adapter and _adapter_at(recipe.from_adapter, folders) is None:
        return resolved
    start = find_start(recipe, folders)
    if start is None:
        return resolved
    reason = f"adapter {start.name}"
    settings = {**_base(start, recipe, resolved), "from_adapter": str(start.folder)}
    # Loaded again: the defaults follow the method.
    changed = load_recipe(resolved, **settings)
    origins = {**changed.origins, **dict.fromkeys(settings, f"derived: {reason}")}
    changed = replace(changed, origins=origins, folder=resolved.folder)
    taken = _settings(start)
    _refuse_changes(changed, taken, start)
    if not _is_explicit(changed, "lora_dropout"):
        taken["lora_dropout"] = _dropout(start)
    return changed.derive(reason, **taken)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of an adapter's weights."""
    with (folder / ADAPTER_WEIGHTS).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def start_folder(recipe: Recipe) -> Path | None:
    """Folder of the adapter that a resolved recipe starts from; None if none is there."""
    if recipe.from_adapter is None:
        return None
    folder = Path(recipe.from_adapter)
    return folder if (folder / ADAPTER_WEIGHTS).exists() else None


def tokenizer_location(recipe: Recipe, location: str) -> str:
    """Folder or hub id to load the tokenizer from: the start adapter's own, else the base's."""
    folder = start_folder(recipe)
    return str(folder) if folder and (folder / "tokenizer_config.json").exists() else location


def _adapter_at(reference: str, folders: Sequence[Path]) -> StartAdapter | None:
    """Return the adapter at a path: a run's, a checkpoint's, or a folder in PEFT's format."""
    if reference == "demo":
        return None
    path = Path(reference).expanduser() if reference.startswith("~/") else Path(reference)
    for folder in folders:
        at = folder / path
        model = (at / CONFIG).exists() or (at / "config.json").exists()
        if RunDir(at).has_run() and not model:
            if not RunDir(at).has_adapter():
                raise RunError(
                    f"{reference}: this run has no adapter yet",
                    hint=f"finish it with: {RunDir(at).going_on()}, or name one of its checkpoints",
                )
            at = RunDir(at).adapter
        if (at / CONFIG).exists():
            if not (at / ADAPTER_WEIGHTS).exists():
                raise ModelError(
                    f"{reference}: {ADAPTER_WEIGHTS} is missing",
                    hint="finish the download; a pickled adapter (.bin) is not read: load it with "
                    "peft on a disposable machine and save it again",
                )
            owners = (at.parent, at.parent.parent)
            run = next((RunDir(p) for p in owners if RunDir(p).has_run()), None)
            return StartAdapter(at, run, read_object(at / CONFIG))
    return None


def _base(start: StartAdapter, recipe: Recipe, resolved: ResolvedRecipe) -> dict[str, Any]:
    """Return base and method for the recipe, unless it names them itself.

    Raises:
        RecipeError: the adapter was trained on a base of another precision.
        ModelError: nothing names the base.
    """
    folders = resolved.folders
    named = _adapter_at(recipe.model, folders) is None
    settings: dict[str, Any] = {}
    if start.run is None:
        base = start.config.get("base_model_name_or_path")
        if not named and not isinstance(base, str):
            raise ModelError(
                f"{start.name}: {CONFIG} names no base model", hint="name the base with model"
            )
        return settings if named else {"model": base}
    parent = load_recipe(start.run.recipe).recipe
    if not named:
        settings["model"] = _from_run(parent.model, start.run)
        settings |= {"revision": parent.revision} if parent.revision else {}
    if not _is_explicit(resolved, "method"):
        settings["method"] = parent.method
    elif recipe.method != parent.method:
        raise RecipeError(
            f"method: {recipe.method}, but {start.name} was trained with method: {parent.method}",
            hint=f"leave method out, or set method: {parent.method}",
        )
    return settings


def _from_run(model: str, run: RunDir) -> str:
    """Resolve the base in a run's recipe, which is relative to the run."""
    local = run.path / model
    return str(local.resolve()) if local.is_dir() else model


def _settings(start: StartAdapter) -> dict[str, Any]:
    """Return the adapter's settings by the recipe's keys.

    Raises:
        ModelError: the adapter has a setting that lorakit does not train.
    """
    from peft import LoraConfig

    values, defaults = start.config, LoraConfig().to_dict()
    for key, value in values.items():
        plain = not value if key not in defaults else value in (defaults[key], None)
        if key == "trainable_token_indices" and start.run is not None:
            continue  # the run's recipe names the tokens
        if key == "target_parameters" and _names_experts(value):
            continue
        if key not in (*KEYS, *NEUTRAL, *SUPPORTED_FIELDS) and not plain:
            raise ModelError(
                f"{start.folder / CONFIG}: {key}: {json.dumps(value)[:60]}, which lorakit does not "
                "train",
                hint="merge this adapter into its base with peft, and train on the result",
            )
    taken = {ours: values.get(theirs, defaults[theirs]) for theirs, ours in KEYS.items()}
    taken["lora"] = {key: values[key] for key in SUPPORTED_FIELDS if values.get(key)}
    for key in ("rank_pattern", "alpha_pattern"):
        taken[key] = taken[key] or {}
    if isinstance(taken["layers_to_transform"], int):
        taken["layers_to_transform"] = [taken["layers_to_transform"]]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(taken[key], list):
            taken[key] = sorted(taken[key])
    taken["expert_adapters"] = "all" if values.get("target_parameters") else "shared"
    if start.run is not None:
        parent = load_recipe(start.run.recipe).recipe
        taken["trainable_tokens"] = list(parent.trainable_tokens)
        taken["expert_adapters"] = parent.expert_adapters
    scheme = taken["init_lora_weights"]
    if isinstance(scheme, str) and scheme.startswith(UNREPEATABLE):
        raise ModelError(
            f"{start.folder / CONFIG}: init_lora_weights: {scheme} changed the base in a way that "
            "cannot be repeated",
            hint="merge this adapter into its base, and train on the result",
        )
    # The other schemes only chose the values that the adapter no longer has.
    if not (isinstance(scheme, str) and scheme.startswith(("pissa", "olora"))):
        taken["init_lora_weights"] = True
    return taken


def _dropout(start: StartAdapter) -> float:
    """Dropout of the run that made the adapter; PEFT's config has none beside experts."""
    if start.run is not None:
        return load_recipe(start.run.recipe).recipe.lora_dropout
    return float(start.config.get("lora_dropout") or 0.0)


def _names_experts(parameters: Any) -> bool:
    """True if these are weights of experts, as `expert_adapters: all` adapts them, or none."""
    names = parameters or []
    return isinstance(names, list) and all(str(name).endswith(EXPERT_WEIGHTS) for name in names)


def _refuse_changes(resolved: ResolvedRecipe, taken: dict[str, Any], start: StartAdapter) -> None:
    faults = []
    for key, value in taken.items():
        own = getattr(resolved.recipe, key)
        if not _is_explicit(resolved, key) or own == "auto" or _same(own, value):
            continue
        faults.append(f"{key}: {json.dumps(own)}, but {start.name} has {json.dumps(value)}")
    if faults:
        raise RecipeError(
            "\n".join(faults),
            hint="leave these keys out to train this adapter further; for another shape, merge it "
            "and train a new adapter on the merged model",
        )


def _same(own: Any, value: Any) -> bool:
    if isinstance(own, list) and isinstance(value, list):
        return set(own) == set(value)
    return bool(own == value) or (not own and not value)


def _is_explicit(resolved: ResolvedRecipe, key: str) -> bool:
    return not resolved.origins.get(key, "default").startswith(("default", "derived"))
