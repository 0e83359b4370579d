"""A key of an Axolotl recipe enters; what lorakit does with it leaves.

Read in Axolotl's `utils/schemas` (2026-07) and its examples, old ones too: its users' files are.
"""

from __future__ import annotations

from typing import Any

from lorakit.errors import RecipeError
from lorakit.recipe_import.axolotl_data import (
    OWN_TEMPLATE,
    datasets,
    held_out_data,
    template,
    texts,
)
from lorakit.recipe_import.rules import (
    Draft,
    Rule,
    Said,
    Tool,
    Unfit,
    by,
    figure,
    held_out,
    is_off,
    is_on,
    left,
    number,
    own,
    same,
    switch,
    text,
    whole,
    words,
)
from lorakit.recipe_import.trainer import (
    ATTENTION,
    BEST,
    BFLOAT16,
    EIGHT_BITS,
    EVAL_MOMENTS,
    EVAL_STEPS,
    FLOAT16,
    FULL,
    GRAD_NORM,
    HUB,
    KEEP,
    KERNELS,
    LOG_STEPS,
    MAX_STEPS,
    OPTIMIZER,
    PER_CARD,
    RECOMPUTE,
    REMOTE,
    SAVE_STEPS,
    SAVED_BY_STEPS,
    SCHEDULER,
    SHARDING,
    SPEED,
    TRAINER,
    WARMUP_RATIO,
    WARMUP_STEPS,
    packed_rows,
    tracker,
)


def _adapter(value: Any, draft: Draft) -> Said:
    if value not in ("lora", "qlora"):
        raise Unfit(f"{value}: lorakit has LoRA and QLoRA only")
    four = value == "qlora" or draft.on("load_in_4bit")
    return Said("taken", {"method": "qlora" if four else "lora"})


def _batch_size(value: Any, draft: Draft) -> Said:
    micro = whole(draft.source.get("micro_batch_size") or 1)
    if whole(value) % micro:
        raise Unfit(f"{value} is no multiple of micro_batch_size {micro}")
    return Said("taken", {"gradient_accumulation_steps": max(1, whole(value) // micro)},
                "all examples of a step, on one card")  # fmt: skip


def _linear(value: Any, draft: Draft) -> Said:
    if is_off(value):
        return Said("own", note="`lora_target_modules` says which")
    return Said("taken", {"target_modules": "all-linear"})


def _targets(value: Any, draft: Draft) -> Said:
    if draft.on("lora_target_linear"):
        return Said("own", note="`lora_target_linear` takes these and all others")
    if isinstance(value, str) and "," not in value:
        return Said("taken", {"target_modules": value.replace("all_linear", "all-linear")})
    return Said("taken", {"target_modules": words(value)})


def _train_on(value: Any, draft: Draft) -> Said:
    return Said("taken", {"train_on": "all"}) if is_on(value) else Said("own", note="off, as here")


def _system(value: Any, draft: Draft) -> Said:
    return Said("taken", {"system": text(value)})


def _tokens(value: Any, draft: Draft) -> Said:
    given = value if isinstance(value, dict) else {"tokens": value}
    if {k for k, v in given.items() if is_on(v)} - {"pad_token", "bos_token", "unk_token"}:
        return Said(
            "left",
            note="the tokenizer's own tokens are used; an answer ends as its template ends it",
        )
    return Said("own", note="the tokenizer's own are used; padding never carries loss")


def _begin(draft: Draft) -> None:
    if draft.on("rl") or draft.on("reward_model") or draft.on("process_reward_model"):
        kind = draft.source.get("rl") or "a reward model"
        raise RecipeError(
            f"rl: {kind}: lorakit trains on answers and on texts only",
            hint="there is no recipe for this; keep Axolotl for it",
        )
    if not draft.on("datasets") and not draft.on("pretraining_dataset"):
        raise RecipeError(
            "no `datasets`: this Axolotl file trains on nothing",
            hint="name a file or a hub data set under `datasets:`",
        )
    if not draft.on("adapter"):
        draft.say("adapter", Said("left", note=f"none: {FULL}"))


def _plugins(value: Any, draft: Draft) -> Said:
    known = ("cut_cross_entropy", "liger", "kernels")
    others = [p for p in words(value) if not any(k in p.lower() for k in known)]
    if others:
        return Said("left", note=f"{', '.join(others)}: plugins are not read")
    return Said("own", note="lorakit's engine has its own kernels, chosen by card (`engine`)")


WANDB = own(
    "a run is called by its folder; the tracker's own variables are read (WANDB_PROJECT ...)"
)
WATCH = own("a loss that is no number skips the step, and ends the run the second time")
MODAL = left("lorakit trains on text only")
OTHER = left("lorakit has LoRA and QLoRA only")
KIND = own("the model's own configuration says it")

KEYS: dict[str, Rule] = {
    "base_model": same("model"),
    "model_revision": same("revision"),
    "revision_of_model": same("revision"),
    "base_model_config": KIND,
    "tokenizer_config": left("the tokenizer of the model is used"),
    "model_type": KIND,
    "tokenizer_type": KIND,
    "tokenizer_use_fast": KIND,
    "tokenizer_legacy": KIND,
    "tokenizer_use_mistral_common": left("the tokenizer in the model's folder is used"),
    "is_llama_derived_model": KIND,
    "is_mistral_derived_model": KIND,
    "is_falcon_derived_model": KIND,
    "is_qwen_derived_model": KIND,
    "trust_remote_code": REMOTE,
    "adapter": by("`method`", "lora or qlora; empty: " + FULL, _adapter),
    "load_in_4bit": own("`method: qlora` says it"),
    "load_4bit": own("`method: qlora` says it"),
    "load_in_8bit": EIGHT_BITS,
    "model_quantization_config": left("a quantized base is not opened: name 16-bit weights"),
    "model_quantization_config_kwargs": own("belongs to `model_quantization_config`"),
    "gptq": left("a 4-bit base is made from 16-bit weights here: name these as `model`"),
    "lora_r": same("lora_r", whole),
    "lora_alpha": same("lora_alpha", figure),
    "lora_dropout": same("lora_dropout", number),
    "lora_target_linear": by("`target_modules`", "all-linear", _linear),
    "lora_target_modules": by("`target_modules`", "", _targets),
    "lora_target_parameters": left("adapters lie on linear layers only"),
    "lora_modules_to_save": same("modules_to_save", words),
    "lora_model_dir": left("a run starts from new adapters: merge this one into the base first"),
    "lora_fan_in_fan_out": KIND,
    "lora_on_cpu": SHARDING,
    "peft_use_dora": switch("use_dora"),
    "peft_use_rslora": switch("use_rslora"),
    "peft_init_lora_weights": same("init_lora_weights", lambda value: value),
    "peft_layers_to_transform": same(
        "layers_to_transform", lambda value: [whole(v) for v in value]
    ),
    "peft": left("4-bit is bitsandbytes' NF4 here; see `method`"),
    "loraplus_lr_ratio": left("both factors have one rate here; try a higher `learning_rate`"),
    "relora": OTHER,
    "unfrozen_parameters": left("adapters train, and `modules_to_save`"),
    "datasets": by("`data`, `columns`", "each `path` with its `name` and `split`", datasets),
    "pretraining_dataset": by("`data`, `documents`", "texts, trained whole", texts),
    "test_datasets": by("`val_data`", "", held_out_data),
    "val_set_size": same("val_size", held_out),
    "chat_template": by("", OWN_TEMPLATE, template),
    "chat_template_jinja": left(f"{OWN_TEMPLATE}; to train another, put it into the tokenizer"),
    "default_system_message": by("`system`", "", _system),
    "eot_tokens": own("the end of a turn is found in the template, and trained"),
    "special_tokens": by("", "the tokenizer's own are used", _tokens),
    "tokens": by("", "no token is added", _tokens),
    "sequence_len": same("cutoff_len", whole, "an answer is never cut here: see `too_long`"),
    "excess_length_strategy": own("see `too_long`"),
    "min_sample_len": left("no row is too short"),
    "train_on_inputs": by("`train_on`", "all", _train_on),
    "sample_packing": packed_rows("sequence_len", 512),
    "eval_sample_packing": own("a score does not depend on it"),
    "pad_to_sequence_len": own("padding carries no loss"),
    "group_by_length": TRAINER["group_by_length"],
    "shuffle_merged_datasets": left("rows are shuffled by `seed`", True),
    "exact_deduplication": own("duplicates are counted and shown: `lorakit inspect`"),
    "dataset_exact_deduplication": own("duplicates are counted and shown: `lorakit inspect`"),
    "dataset_prepared_path": SPEED,
    "dataset_processes": SPEED,
    "dataset_num_proc": SPEED,
    "dataloader_num_workers": SPEED,
    "dataloader_pin_memory": SPEED,
    "push_dataset_to_hub": SPEED,
    "streaming": own("rows are read as a stream, and large hub data is not downloaded whole"),
    "micro_batch_size": same("micro_batch_size", whole, PER_CARD),
    "gradient_accumulation_steps": same("gradient_accumulation_steps", whole),
    "batch_size": by("`gradient_accumulation_steps`", "divided by micro_batch_size", _batch_size),
    "eval_batch_size": own("chosen by memory"),
    "auto_find_batch_size": TRAINER["auto_find_batch_size"],
    "num_epochs": same("epochs", number),
    "max_steps": MAX_STEPS,
    "optimizer": OPTIMIZER,
    "optim_args": TRAINER["optim_args"],
    "adam_beta1": TRAINER["adam_beta1"],
    "adam_beta2": TRAINER["adam_beta2"],
    "adam_epsilon": TRAINER["adam_epsilon"],
    "lr_scheduler": SCHEDULER,
    "lr_scheduler_kwargs": TRAINER["lr_scheduler_kwargs"],
    "cosine_min_lr_ratio": left("a cosine ends at 0 here"),
    "cosine_constant_lr_ratio": left("a cosine ends at 0 here"),
    "learning_rate": same("learning_rate", number),
    "embedding_lr": left("one rate for all"),
    "weight_decay": same("weight_decay", number),
    "max_grad_norm": GRAD_NORM,
    "warmup_steps": WARMUP_STEPS,
    "warmup_ratio": WARMUP_RATIO,
    "neftune_noise_alpha": TRAINER["neftune_noise_alpha"],
    "seed": same("seed", whole),
    "bf16": BFLOAT16,
    "fp16": FLOAT16,
    "bfloat16": BFLOAT16,
    "float16": FLOAT16,
    "tf32": TRAINER["tf32"],
    "fp8": left("products are in 16 bits here"),
    "gradient_checkpointing": RECOMPUTE,
    "gradient_checkpointing_kwargs": RECOMPUTE,
    "activation_offloading": RECOMPUTE,
    "attn_implementation": ATTENTION,
    "attention": ATTENTION,
    "flash_attention": ATTENTION,
    "sdp_attention": ATTENTION,
    "xformers_attention": ATTENTION,
    "eager_attention": ATTENTION,
    "flex_attention": ATTENTION,
    "s2_attention": left("attention is not shifted here"),
    "scaling_softmax": left("attention is the model's own here"),
    "lora_mlp_kernel": KERNELS,
    "lora_qkv_kernel": KERNELS,
    "lora_o_kernel": KERNELS,
    "unsloth_lora_mlp": KERNELS,
    "unsloth_lora_qkv": KERNELS,
    "unsloth_lora_o": KERNELS,
    "liger_rope": KERNELS,
    "liger_rms_norm": KERNELS,
    "liger_glu_activation": KERNELS,
    "liger_fused_linear_cross_entropy": KERNELS,
    "cut_cross_entropy": KERNELS,
    "use_kernels": KERNELS,
    "torch_compile": KERNELS,
    "plugins": by("", "kernels: lorakit's own; others are not read", _plugins),
    "deepspeed": SHARDING,
    "fsdp": SHARDING,
    "fsdp_config": SHARDING,
    "fsdp_version": SHARDING,
    "ddp": SHARDING,
    "ddp_find_unused_parameters": SHARDING,
    "local_rank": SHARDING,
    "device_map": SHARDING,
    "max_memory": SHARDING,
    "gpu_memory_limit": own("see `memory_limit`"),
    "low_cpu_mem_usage": SPEED,
    "experimental_skip_move_to_device": SPEED,
    "output_dir": same("output_dir", text, "a run is never overwritten"),
    "save_steps": SAVE_STEPS,
    "saves_per_epoch": own(SAVED_BY_STEPS),
    "save_strategy": own(SAVED_BY_STEPS),
    "save_total_limit": KEEP,
    "save_only_model": TRAINER["save_only_model"],
    "save_first_step": own(SAVED_BY_STEPS),
    "save_safetensors": own("always"),
    "resume_from_checkpoint": TRAINER["resume_from_checkpoint"],
    "auto_resume_from_checkpoints": TRAINER["resume_from_checkpoint"],
    "eval_steps": EVAL_STEPS,
    "evals_per_epoch": EVAL_MOMENTS,
    "eval_strategy": EVAL_MOMENTS,
    "evaluation_strategy": EVAL_MOMENTS,
    "eval_table_size": EVAL_MOMENTS,
    "eval_max_new_tokens": EVAL_MOMENTS,
    "eval_table_max_new_tokens": EVAL_MOMENTS,
    "early_stopping_patience": left("a run ends by `epochs` or `max_steps`"),
    "load_best_model_at_end": BEST,
    "metric_for_best_model": TRAINER["metric_for_best_model"],
    "logging_steps": LOG_STEPS,
    "loss_watchdog_threshold": WATCH,
    "loss_watchdog_patience": WATCH,
    "strict": own("unknown keys are always refused here; `strict` means faults of the data"),
    "debug": own("`lorakit inspect` shows the tokens"),
    "use_wandb": tracker("wandb"),
    "wandb_project": tracker("wandb"),
    "wandb_entity": WANDB,
    "wandb_name": WANDB,
    "wandb_run_id": WANDB,
    "wandb_watch": WANDB,
    "wandb_log_model": WANDB,
    "wandb_mode": WANDB,
    "use_tensorboard": tracker("tensorboard"),
    "use_mlflow": tracker("mlflow"),
    "mlflow_tracking_uri": WANDB,
    "mlflow_experiment_name": WANDB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hf_use_auth_token": TRAINER["hub_token"],
    "torchdistx_path": OTHER,
    "gptq_groupsize": own("belongs to `gptq`"),
    "gptq_model_v1": own("belongs to `gptq`"),
    "max_packed_sequence_len": own("see `sequence_len`"),
    "processor_type": MODAL,
    "image_size": MODAL,
    "freeze_mm_modules": own("adapters train, and text only"),
}

DEFAULTS: dict[str, Any] = {
    "method": "lora",
    "lora_dropout": 0.0,
    "cutoff_len": 512,
    "val_size": 0,
    "epochs": 1.0,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw",
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
}
AXOLOTL = Tool("Axolotl", KEYS, DEFAULTS, _begin)
