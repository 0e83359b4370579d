"""A key of transformers' TrainingArguments enters; what lorakit does with it leaves.

LLaMA-Factory, TRL and Unsloth scripts all pass these on by the same names, with the same defaults.
Read in transformers 5.23 and TRL 1.16.
"""

from __future__ import annotations

from typing import Any

from lorakit.recipe_import.rules import (
    Draft,
    Rule,
    Said,
    Unfit,
    by,
    choice,
    is_off,
    is_on,
    left,
    number,
    own,
    same,
    text,
    whole,
    words,
)

OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
SCHEDULERS = {
    name: name for name in ("linear", "cosine", "constant", "constant_with_warmup")
}  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

FULL = (
    "lorakit trains adapters only: this becomes LoRA at lorakit's rank; compare before you trust it"
)
OPTIMIZER = choice("optimizer", OPTIMIZERS, "no such optimizer here, and the rate may not suit")
SCHEDULER = choice("lr_scheduler", SCHEDULERS, "no such schedule here")
PER_CARD = "counted per card there: on N cards a step there has N times as many examples"
SHARDING = own("no setting here: the plan finds a way into the memory; `lorakit train --gpus N`")
KERNELS = own("lorakit's engine has its own kernels, chosen by card (`engine`)")
ATTENTION = own("the attention kernel is chosen by card and model, and named in the run")
RECOMPUTE = own(
    "`gradient_checkpointing: auto` recomputes as much as the plan needs; same gradients"
)
SPEED = own("loading data needs no setting here")
HUB = own("after the run: `lorakit export RUN --to hub --repo OWNER/NAME`")
TOKEN = own("no token is read from a recipe: `hf auth login`")
BEST = left("the adapter of the last step is kept; checkpoints with their held-out losses stay too")
REMOTE = own(
    "left off: set `trust_remote_code: true` yourself if you trust code of the model's author"
)
SAVED_BY_STEPS = "a run saves every `save_every` steps (100) or minutes, and at its end"


def _eight_bits(value: Any, draft: Draft) -> Said:
    """8-bit counts only where no 4-bit goes before it."""
    if is_off(value) or draft.source.get("adapter") == "qlora" or draft.on("load_in_4bit"):
        return Said("own", note="off")
    note = "the base is 16-bit here: set `method: qlora` for 4-bit if it does not fit"
    return Said("left", note=note)


def _max_steps(value: Any, draft: Draft) -> Said:
    steps = whole(value)
    return Said("taken", {"max_steps": steps}) if steps > 0 else Said("own", note="by epochs")


def _warmup_steps(value: Any, draft: Draft) -> Said:
    steps = number(value)
    if 0 < steps < 1:
        return Said("taken", {"warmup_ratio": steps})
    if steps == 0 and draft.on("warmup_ratio"):
        return Said("own", note="`warmup_ratio` says it")
    return Said("taken", {"warmup_steps": whole(value)})


def _warmup_ratio(value: Any, draft: Draft) -> Said:
    if draft.on("warmup_steps"):
        return Said("own", note="`warmup_steps` goes before it, there as here")
    return Said("taken", {"warmup_ratio": number(value)})


def _grad_norm(value: Any, draft: Draft) -> Said:
    norm = number(value)
    if norm == 0:
        return Said("taken", {"max_grad_norm": 1e9}, "0 is no clipping there: a bound out of reach")
    return Said("taken", {"max_grad_norm": norm})


def _steps(here: str, otherwise: str) -> Rule:
    """A count of steps; a share of the run, which some tools allow, has no match."""

    def read(value: Any, draft: Draft) -> Said:
        count = number(value)
        if count < 1:
            return Said("own", note=otherwise)
        return Said("taken", {here: whole(value)})

    return by(f"`{here}`", f"a share of the run: {otherwise}", read)


def _dtype(here: str) -> Rule:
    def read(value: Any, draft: Draft) -> Said:
        if is_off(value):
            return Said("own", note="off")
        if value == "auto":
            return Said("taken", {"dtype": "auto"})
        if here == "float16" and draft.on("bf16"):
            return Said("own", note="bf16 goes before it")
        return Said("taken", {"dtype": here})

    return by("`dtype`", f"{here}; adapters are float32 in any case", read)


def _trackers(value: Any, draft: Draft) -> Said:
    if is_off(value) or value == ["none"]:
        return Said("taken", {"report_to": []})
    found = [name.lower() for name in words(value)]
    unknown = [name for name in found if name not in TRACKERS]
    if unknown:
        raise Unfit(f"{', '.join(unknown)}: lorakit reports to {', '.join(TRACKERS)}")
    return Said("taken", {"report_to": found})


def packed_rows(length: str, default: int) -> Rule:
    """Packing where a step counts rows that are full of examples; here it counts examples."""

    def read(value: Any, draft: Draft) -> Said:
        if is_off(value):
            return Said("own", note="rows lie side by side without padding here, each by itself")
        tokens = draft.source.get(length, default)
        note = (
            f"there a row of a step is {tokens} tokens full of examples, here one example: "
            f"multiply gradient_accumulation_steps by about {tokens} / the mean tokens in "
            "`lorakit inspect`"
        )
        return Said("left", note=note)

    return by("", "a row is one example here: see `gradient_accumulation_steps`", read)


def tracker(name: str) -> Rule:
    """A key that switches one tracker on."""

    def read(value: Any, draft: Draft) -> Said:
        if is_off(value):
            return Said("own", note="off")
        known = draft.values.get("report_to", [])
        return Said("taken", {"report_to": [*known, *({name} - set(known))]})

    return by("`report_to`", f"[{name}]", read)


EIGHT_BITS = by("", "the base is 16-bit here, or 4-bit with `method: qlora`", _eight_bits)
FLOAT16, BFLOAT16 = _dtype("float16"), _dtype("bfloat16")
SAVE_STEPS = _steps("save_every", SAVED_BY_STEPS)
EVAL_STEPS = _steps(
    "eval_every", "the held-out loss is taken at the end, or every `eval_every` steps"
)
LOG_STEPS = _steps("log_every", "every step is a row of metrics.jsonl")
LOG_STEPS_OWN = own("see `log_every`; every step is a row of metrics.jsonl by default")
KEEP = _steps("keep_checkpoints", "the two newest are kept")
WARMUP_STEPS = by("`warmup_steps`", "below 1: `warmup_ratio`", _warmup_steps)
WARMUP_RATIO = by("`warmup_ratio`", "", _warmup_ratio)
MAX_STEPS = by("`max_steps`", "-1: by epochs", _max_steps)
GRAD_NORM = by("`max_grad_norm`", "0, no clipping: 1e9", _grad_norm)
EVAL_MOMENTS = own(
    "the held-out loss is taken at the end, and every `eval_every` steps if it is set"
)

TRAINER: dict[str, Rule] = {
    "learning_rate": same("learning_rate", number),
    "num_train_epochs": same("epochs", number),
    "max_steps": MAX_STEPS,
    "per_device_train_batch_size": same("micro_batch_size", whole, PER_CARD),
    "gradient_accumulation_steps": same("gradient_accumulation_steps", whole),
    "lr_scheduler_type": SCHEDULER,
    "lr_scheduler_kwargs": left("schedules have no further settings here"),
    "warmup_ratio": WARMUP_RATIO,
    "warmup_steps": WARMUP_STEPS,
    "weight_decay": same("weight_decay", number),
    "max_grad_norm": GRAD_NORM,
    "optim": OPTIMIZER,
    "optim_args": left("optimizers have no further settings here"),
    "adam_beta1": left("AdamW runs with 0.9 and 0.999 here", 0.9),
    "adam_beta2": left("AdamW runs with 0.9 and 0.999 here", 0.999),
    "adam_epsilon": left("AdamW runs with 1e-8 here", 1e-8),
    "label_smoothing_factor": left("labels are not smoothed here"),
    "neftune_noise_alpha": left("no noise is added to embeddings here"),
    "seed": same("seed", whole),
    "data_seed": own("`seed` decides the order too"),
    "full_determinism": by(
        "`deterministic`", "", lambda value, draft: Said("taken", {"deterministic": is_on(value)})
    ),
    "bf16": BFLOAT16,
    "fp16": FLOAT16,
    "tf32": own("only products in float32 would change; lorakit leaves them as they are"),
    "output_dir": same("output_dir", text, "a run is never overwritten"),
    "overwrite_output_dir": own("a run is never overwritten: give the next one another folder"),
    "logging_steps": LOG_STEPS,
    "save_steps": SAVE_STEPS,
    "save_strategy": own(SAVED_BY_STEPS),
    "save_total_limit": KEEP,
    "save_only_model": own("a checkpoint always holds what resuming needs"),
    "resume_from_checkpoint": own("`lorakit train RECIPE --resume`"),
    "eval_strategy": EVAL_MOMENTS,
    "evaluation_strategy": EVAL_MOMENTS,
    "eval_steps": EVAL_STEPS,
    "per_device_eval_batch_size": own("chosen by memory"),
    "load_best_model_at_end": BEST,
    "metric_for_best_model": own("has no effect without `load_best_model_at_end`"),
    "greater_is_better": own("has no effect without `load_best_model_at_end`"),
    "group_by_length": own("packing leaves no padding to save"),
    "gradient_checkpointing": RECOMPUTE,
    "gradient_checkpointing_kwargs": RECOMPUTE,
    "auto_find_batch_size": own("out of memory, a step is done again in smaller micro-batches"),
    "deepspeed": SHARDING,
    "fsdp": SHARDING,
    "fsdp_config": SHARDING,
    "ddp_timeout": SHARDING,
    "ddp_find_unused_parameters": SHARDING,
    "ddp_bucket_cap_mb": SHARDING,
    "torch_compile": KERNELS,
    "use_liger_kernel": KERNELS,
    "dataloader_num_workers": SPEED,
    "dataloader_pin_memory": SPEED,
    "dataloader_prefetch_factor": SPEED,
    "dataloader_persistent_workers": SPEED,
    "remove_unused_columns": SPEED,
    "report_to": by("`report_to`", "one of " + ", ".join(TRACKERS), _trackers),
    "run_name": own("a run is called by its folder"),
    "push_to_hub": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_private_repo": HUB,
    "hub_token": TOKEN,
    "trust_remote_code": REMOTE,
    "do_train": own("`lorakit train` trains"),
    "do_eval": own("the held-out rows are scored at the end"),
    "do_predict": own("`lorakit chat RUN` and `lorakit eval RUN`"),
    "local_rank": SHARDING,
    "logging_strategy": LOG_STEPS_OWN,
    "logging_first_step": LOG_STEPS_OWN,
    "log_level": own("no setting of what is trained"),
    "disable_tqdm": own("no setting of what is trained"),
}

# What TrainingArguments does where nothing is written, in our words.
TRAINER_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "epochs": 3.0,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optimizer": "adamw",
    "seed": 42,
}
