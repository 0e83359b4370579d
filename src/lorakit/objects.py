"""Objects of a Python program as parts of a run: datasets, models, callbacks, configurations.

What an object decides becomes settings of the recipe, so that plan, checks, records and resume are
those of any run. Only what no file can hold is passed on as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lorakit.data import cache
from lorakit.data.sources.python_rows import write_rows
from lorakit.errors import LorakitError, ModelError, RecipeError
from lorakit.model.loaded_base import settings_of
from lorakit.model.shared_base import SharedBase
from lorakit.model.start_adapter import weights_sha256
from lorakit.recipe.aliases import LORA_KEYS, TRAINING_KEYS
from lorakit.storage.user_cache import writable_cache

Metric = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Objects:
    """Objects that a run uses as they are.

    Attributes:
        base: a loaded base model, instead of the one that `model` names.
        shared: the base of a sweep, loaded once for all of its runs.
        tokenizer: instead of the model's.
        callbacks: transformers' TrainerCallback objects.
        metrics: functions of (answer, reference) by name, see `inference/evaluate.py`.
    """

    base: Any = None
    shared: SharedBase | None = None
    tokenizer: Any = None
    callbacks: Sequence[Any] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)


NO_OBJECTS = Objects()


def take_objects(
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    peft_config: Any = None,
    training_args: Any = None,
    callbacks: Sequence[Any] = (),
    metrics: Mapping[str, Metric] | None = None,
) -> tuple[Objects, dict[str, dict[str, Any]]]:
    """Divide objects into those that are passed on, and settings by the name of the argument.

    Raises:
        LorakitError: an object has the wrong type or cannot be used.
    """
    settings: dict[str, dict[str, Any]] = {}
    if train_dataset is not None:
        settings["train_dataset"] = {"data": str(write_rows(train_dataset, "train_dataset"))}
    if eval_dataset is not None:
        settings["eval_dataset"] = {"val_data": str(write_rows(eval_dataset, "eval_dataset"))}
    if peft_config is not None:
        settings["peft_config"] = _lora_settings(peft_config)
    if training_args is not None:
        settings["training_args"] = _training_settings(training_args)
    base = None
    if model is not None:
        base, settings["model"] = _base(model)
    if tokenizer is not None and not hasattr(tokenizer, "apply_chat_template"):
        raise ModelError(f"tokenizer is a {type(tokenizer).__name__}, expected a tokenizer")
    return (
        Objects(base, None, tokenizer, _callbacks(callbacks), _metrics(metrics or {})),
        settings,
    )


def _base(model: Any) -> tuple[Any, dict[str, Any]]:
    """Return a base model and its settings; the adapter of a PeftModel is saved to start from."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model, settings_of(model)
    settings = settings_of(model.get_base_model())
    folder = _save_adapter(model)
    return model.unload(), {**settings, "from_adapter": str(folder)}


def _save_adapter(model: Any) -> Path:
    """Save the adapter of a PeftModel into the cache; the same weights give the same folder."""
    home = writable_cache(cache.cache_home())
    with tempfile.TemporaryDirectory(prefix=cache.MAKING, dir=home) as made:
        saved = Path(made) / "adapter"
        # Without a task peft writes the names of Python modules to import.
        model.peft_config[model.active_adapter].task_type = "CAUSAL_LM"
        model.save_pretrained(saved, selected_adapters=[model.active_adapter])
        inner = saved / model.active_adapter
        saved = inner if inner.is_dir() else saved
        folder = home / f"adapter-{weights_sha256(saved)[:16]}"
        return folder if folder.exists() else saved.replace(folder)


def _lora_settings(config: Any) -> dict[str, Any]:
    """Settings of a LoraConfig: every field counts, also one with peft's default."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise RecipeError(
            f"peft_config is a {type(config).__name__}, expected a LoraConfig",
            hint="lorakit trains LoRA adapters only",
        )
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise RecipeError(f"peft_config: task_type is {task}, expected CAUSAL_LM")
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    settings = {}
    for name, key in LORA_KEYS.items():
        value = values[name]
        if isinstance(value, set | tuple):
            value = sorted(value)
        if isinstance(value, int) and key == "layers_to_transform":
            value = [value]
        if value is not None:
            settings[key] = value
    if rows := config.trainable_token_indices:
        raise RecipeError(
            f"peft_config: trainable_token_indices is {str(rows)[:60]}, which names rows by number",
            hint="name the tokens with trainable_tokens",
        )
    ignored = {*LORA_KEYS, "task_type", "peft_type", "peft_version", "base_model_name_or_path"}
    more = {
        name: value
        for name, value in values.items()
        if name not in ignored and value != defaults.get(name) and name != "inference_mode"
    }
    return {**settings, **({"lora": more} if more else {})}


# Fields that change neither rows nor steps: a default of TRL does not replace what lorakit chooses.
_ONLY_IF_SET = {
    *("gradient_checkpointing", "output_dir", "report_to", "bf16", "fp16", "packing"),
    *("logging_steps", "save_steps", "save_total_limit", "eval_steps", "trust_remote_code"),
    *("load_best_model_at_end", "metric_for_best_model", "full_determinism", "max_steps"),
    "router_aux_loss_coef",
}


def _training_settings(given: Any) -> dict[str, Any]:
    """Settings of TrainingArguments, SFTConfig or a dict of their fields.

    An object gives every value that changes rows or steps, also those with TRL's default; a dict
    gives what it has.
    """
    from transformers import TrainingArguments

    if isinstance(given, Mapping):
        return {"training_args": dict(given)}
    if not isinstance(given, TrainingArguments):
        raise RecipeError(
            f"training_args is a {type(given).__name__}, expected SFTConfig, TrainingArguments or "
            "a dict of their fields"
        )
    chosen = {name: getattr(given, name) for name in ("output_dir", "use_cpu", "bf16", "fp16")}
    plain = type(given)(**chosen)
    found: dict[str, Any] = {}
    for name in (each.name for each in fields(given)):
        value, default = getattr(given, name), getattr(plain, name)
        value = getattr(value, "value", value)  # of an enum
        changed = value != getattr(default, "value", default)
        if changed or (name in TRAINING_KEYS and name not in _ONLY_IF_SET):
            found[name] = value
    if given.fp16:
        found["fp16"] = True
    if given.use_cpu and torch.cuda.is_available():
        raise RecipeError(
            "training_args: use_cpu is true, but a run is on the GPU where there is one",
            hint="hide the GPU: CUDA_VISIBLE_DEVICES=''",
        )
    if "output_dir" not in found and given.output_dir not in (None, "trainer_output"):
        found["output_dir"] = given.output_dir
    # Fields that follow from others, or that say what lorakit does anyway.
    implied = {
        "logging_dir": True,
        "do_eval": True,
        "eval_strategy": found.get("eval_strategy") in ("steps", "no"),
        "save_strategy": found.get("save_strategy") == "steps",
        "data_seed": found.get("data_seed") == found.get("seed"),
    }
    return {"training_args": {k: v for k, v in found.items() if not implied.get(k)}}


def _callbacks(callbacks: Sequence[Any]) -> Sequence[Any]:
    from transformers import TrainerCallback

    if isinstance(callbacks, TrainerCallback | type):
        callbacks = [callbacks]
    made = [each() if isinstance(each, type) else each for each in callbacks]
    for each in made:
        if not isinstance(each, TrainerCallback):
            raise LorakitError(
                f"callbacks has a {type(each).__name__}, expected transformers' TrainerCallback"
            )
    return made


def _metrics(metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
    if not isinstance(metrics, Mapping):
        raise LorakitError(
            f"metrics is a {type(metrics).__name__}, expected a dict of functions by name",
            hint="metrics={'exact': lambda answer, reference: answer == reference}",
        )
    for name, function in metrics.items():
        if not callable(function):
            raise LorakitError(
                f"metrics: {name} is a {type(function).__name__}, expected a function of "
                "(answer, reference)"
            )
    return metrics
