"""Names of settings in PEFT, transformers, TRL, Axolotl and LLaMA-Factory, as keys of a recipe.

A name is accepted where it means what our key means. Others (`batch_size`: per device or in all?)
are only suggested in the error for an unknown key. The groups `lora` and `training_args` hold
fields of `LoraConfig` and `SFTConfig`: a field that a key of the recipe stands for becomes that
key, so that each setting has one place.
"""

from __future__ import annotations

import json
from typing import Any

# Same meaning, same values.
ALIASES = {
    "adapter_name_or_path": "from_adapter",
    "adapter_path": "from_adapter",
    "alpha": "lora_alpha",
    "base_model": "model",
    "column_mapping": "columns",
    "dataset_name": "data",
    "dataset_path": "data",
    "eval_data": "val_data",
    "fsdp_config": "fsdp",
    "eval_steps": "eval_every",
    "full_determinism": "deterministic",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "logging_steps": "log_every",
    "lora_model_dir": "from_adapter",
    "lora_rank": "lora_r",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "max_length": "cutoff_len",
    "max_seq_len": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "output": "output_dir",
    "per_device_train_batch_size": "micro_batch_size",
    "pretrained_adapter": "from_adapter",
    "r": "lora_r",
    "sample_packing": "packing",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "sequence_len": "cutoff_len",
    "system_prompt": "system",
    "torch_dtype": "dtype",
    "train_file": "data",
    "val_set_size": "val_size",
    # One value of theirs is one of ours, see VALUES.
    "adapter": "method",
    "bf16": "dtype",
    "finetuning_type": "method",
    "fp16": "dtype",
    "load_in_4bit": "method",
    "train_on_inputs": "train_on",
}
# Our values of a key for theirs. A name with an entry here takes no other value.
VALUES: dict[str, dict[Any, Any]] = {
    "adapter": {"lora": "lora", "qlora": "qlora"},
    "bf16": {True: "bfloat16"},
    "finetuning_type": {"lora": "lora"},
    "fp16": {True: "float16"},
    "load_in_4bit": {True: "qlora", False: "lora"},
    "train_on_inputs": {True: "all", False: "responses"},
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
}
# Names that mean something else, or take other values; suggested only.
SUGGESTED = {
    "add_special_tokens": "trainable_tokens",
    "add_tokens": "trainable_tokens",
    "batch_size": "micro_batch_size",
    "dataset": "data",
    "datasets": "data",
    "deepspeed": "fsdp",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "padding_free": "packing",
    "rank": "lora_r",
    "resume_adapter_file": "from_adapter",
    "special_tokens": "trainable_tokens",
    "test_size": "val_size",
    "trainable_token_indices": "trainable_tokens",
}
SYNONYMS = {**ALIASES, **SUGGESTED}

# Keys of the recipe for fields of LoraConfig, and of SFTConfig with its parents.
LORA_KEYS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "bias": "bias",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
    "init_lora_weights": "init_lora_weights",
}
TRAINING_KEYS = {
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optim": "optimizer",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_length": "cutoff_len",
    "seed": "seed",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "eval_steps": "eval_every",
    "load_best_model_at_end": "load_best_model_at_end",
    "metric_for_best_model": "metric_for_best_model",
    "report_to": "report_to",
    "output_dir": "output_dir",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "packing": "packing",
    "full_determinism": "deterministic",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "trust_remote_code": "trust_remote_code",
}
GROUPS = {"lora": LORA_KEYS, "training_args": TRAINING_KEYS}


def apply_aliases(
    values: dict[str, Any], origins: dict[str, str], faults: list[str], known: set[str]
) -> None:
    """Move values under other names, and in groups, to the keys that they mean, in place.

    Args:
        known: keys of a recipe.
    """
    for group, keys in GROUPS.items():
        if isinstance(fields := values.get(group), dict):
            values[group] = dict(fields)
            for field in [name for name in fields if name in keys]:
                origin = f"{origins[group]} ({group}.{field})"
                value = values[group].pop(field)
                _move(field, keys[field], value, origin, values, origins, faults)
    for name in [name for name in values if name in ALIASES and name not in known]:
        value, origin = values.pop(name), f"{origins.pop(name)} ({name})"
        _move(name, ALIASES[name], value, origin, values, origins, faults)


def _move(
    name: str,
    key: str,
    value: Any,
    origin: str,
    values: dict[str, Any],
    origins: dict[str, str],
    faults: list[str],
) -> None:
    if name == "warmup_steps" and isinstance(value, float) and value < 1:
        key = "warmup_ratio"  # as transformers reads it
    if name == "max_steps" and value == -1:
        value = None
    if key == "optimizer" and isinstance(value, str):
        value = OPTIMIZERS.get(value, value)
    # A dict would take 1 for True.
    match = [
        ours
        for theirs, ours in VALUES.get(name, {}).items()
        if theirs is value or (isinstance(value, str) and theirs == value)
    ]
    if match:
        value = match[0]
    elif name in VALUES:
        expected = " or ".join(json.dumps(theirs) for theirs in VALUES[name])
        faults.append(f"{name}: means {key}, expected {expected} (found: {json.dumps(value)})")
        return
    if key in values and values[key] != value:
        faults.append(f"{name}: sets {key}, which is {json.dumps(values[key])} too; keep one")
        return
    values[key], origins[key] = value, origin
