"""A key of a TRL config, an Unsloth script or PEFT's adapter_config.json enters; ours leaves.

TRL's are the fields of SFTConfig, ModelConfig and ScriptArguments, as `trl sft --config` reads
them (TRL 1.16). Unsloth's are the arguments of its from_pretrained, get_peft_model and command
line, beside SFTConfig's (2026-10). An adapter_config.json says nothing of data and rates.
"""

from __future__ import annotations

from typing import Any

from lorakit.errors import RecipeError
from lorakit.recipe_import.rules import (
    Draft,
    Rule,
    Said,
    Tool,
    Unfit,
    by,
    figure,
    held_out,
    hub_id,
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
    EIGHT_BITS,
    FULL,
    HUB,
    KERNELS,
    RECOMPUTE,
    SPEED,
    TOKEN,
    TRAINER,
    TRAINER_DEFAULTS,
    packed_rows,
)

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_TOKENS = (
    "TRL trains every token of `messages` rows where neither is set, lorakit the answers: for the "
    "same, set train_on: all"
)


def _four_bits(value: Any, draft: Draft) -> Said:
    return Said("taken", {"method": "qlora" if is_on(value) else "lora"})


def _targets(value: Any, draft: Draft) -> Said:
    names = words(value)
    return Said("taken", {"target_modules": "all-linear" if names == ["all-linear"] else names})


def _dtype(value: Any, draft: Draft) -> Said:
    kind = str(value).removeprefix("torch.")
    if kind not in ("auto", "bfloat16", "float16", "float32"):
        raise Unfit(f"{kind}: auto, bfloat16, float16 or float32")
    return Said("taken", {"dtype": kind})


def _dataset(value: Any, draft: Draft) -> Said:
    source = draft.source
    named = hub_id(text(value), source.get("dataset_config"), source.get("dataset_train_split"))
    return Said("taken", {"data": named})


def _mixture(value: Any, draft: Draft) -> Said:
    found = []
    for entry in value:
        if not isinstance(entry, dict) or not entry.get("path"):
            raise Unfit("an entry has no `path`: write `data` yourself")
        found.append(hub_id(entry["path"], entry.get("name"), entry.get("split")))
    return Said("taken", {"data": found[0] if len(found) == 1 else found})


def _handbook(value: Any, draft: Draft) -> Said:
    """`dataset_mixture` of the alignment handbook: a weight is the share of rows taken."""
    found: list[Any] = []
    for entry in value["datasets"]:
        source = hub_id(entry["id"], entry.get("config"), entry.get("split"))
        weight = number(1.0 if entry.get("weight") is None else entry["weight"])
        found.append(source if weight == 1 else {"source": source, "weight": weight})
    values: dict[str, Any] = {"data": found[0] if found == [str(found[0])] else found}
    if is_on(value.get("test_split_size")):
        values["val_size"] = held_out(value["test_split_size"])
    return Said("taken", values)


def _text_column(value: Any, draft: Draft) -> Said:
    if value == "text":
        return Said("own", note="found by its name")
    return Said("taken", {"columns": {"text": text(value)}})


def _answers_only(value: Any, draft: Draft) -> Said:
    return (
        Said("taken", {"train_on": "responses"}) if is_on(value) else Said("left", note=ALL_TOKENS)
    )


def _init(value: Any, draft: Draft) -> Said:
    if not isinstance(value, bool | str):
        raise Unfit("true, or one of peft's schemes by name")
    return Said("taken", {"init_lora_weights": value})


def _begin_trl(draft: Draft) -> None:
    if not any(map(draft.on, ("dataset_name", "datasets", "dataset_mixture"))):
        raise RecipeError(
            "no `dataset_name`: a TRL config without data",
            hint="name a file or a hub data set: dataset_name: my.jsonl",
        )
    if not draft.on("use_peft"):
        draft.say("use_peft", Said("left", note=f"off: {FULL}"))
    if not draft.on("assistant_only_loss") and not draft.on("completion_only_loss"):
        draft.say("assistant_only_loss", Said("left", note=ALL_TOKENS))


def _begin_unsloth(draft: Draft) -> None:
    if not draft.on("dataset"):
        raise RecipeError(
            "no `dataset`: Unsloth settings without data",
            hint="name a file or a hub data set: dataset: my.jsonl",
        )
    note = (
        "Unsloth trains every token unless train_on_responses_only is called, lorakit the answers"
    )
    draft.say(
        "train_on_responses_only", Said("left", note=f"{note}: for the same, set train_on: all")
    )


def _begin_peft(draft: Draft) -> None:
    if draft.source.get("peft_type") != "LORA":
        raise RecipeError(
            f"peft_type: {draft.source.get('peft_type')}: lorakit has LoRA and QLoRA only",
            hint="there is no recipe for this adapter",
        )
    note = "an adapter's file does not say what it was trained on, nor how"
    draft.say("data", Said("left", {"data": "data/train.jsonl"}, f"{note}: write `data`"))


# What PEFT's LoraConfig and get_peft_model have in common.
_LORA: dict[str, Rule] = {
    "lora_alpha": same("lora_alpha", figure),
    "lora_dropout": same("lora_dropout", number),
    "target_modules": by("`target_modules`", "", _targets),
    "modules_to_save": same("modules_to_save", words),
    "bias": same("bias"),
    "use_rslora": switch("use_rslora"),
    "use_dora": switch("use_dora"),
    "layers_to_transform": same("layers_to_transform", lambda value: [whole(v) for v in value]),
    "exclude_modules": same("exclude_modules", words),
    "r": same("lora_r", whole),
    "loftq_config": left("start from `init_lora_weights: true`, or pissa"),
}

TRL_KEYS: dict[str, Rule] = {
    **TRAINER,
    "model_name_or_path": same("model"),
    "model_revision": same("revision"),
    "dtype": by("`dtype`", "", _dtype),
    "torch_dtype": by("`dtype`", "", _dtype),
    "attn_implementation": ATTENTION,
    "use_peft": by("`method`", "lora; off: " + FULL, lambda value, draft: Said("own")),
    "lora_r": same("lora_r", whole),
    "lora_alpha": same("lora_alpha", figure),
    "lora_dropout": same("lora_dropout", number),
    "lora_target_modules": by("`target_modules`", "", _targets),
    "lora_modules_to_save": same("modules_to_save", words),
    "lora_target_parameters": left("adapters lie on linear layers only"),
    "lora_task_type": own("a causal language model"),
    "use_rslora": switch("use_rslora"),
    "use_dora": switch("use_dora"),
    "load_in_4bit": by("`method`", "true: qlora", _four_bits),
    "load_in_8bit": EIGHT_BITS,
    "bnb_4bit_quant_type": left("4-bit is NF4 here", "nf4"),
    "use_bnb_nested_quant": own("always on here"),
    "dataset_name": by("`data`", "with dataset_config and dataset_train_split", _dataset),
    "datasets": by("`data`", "each `path` with its `name` and `split`", _mixture),
    "dataset_mixture": by("`data`, `val_size`", "the alignment handbook's form", _handbook),
    "dataset_config": own("read with `dataset_name`"),
    "dataset_train_split": own("read with `dataset_name`"),
    "dataset_test_split": own(
        "5% of the rows are held out; `val_data` or `val_size` choose others"
    ),
    "dataset_streaming": own("large hub data is not downloaded whole"),
    "dataset_text_field": by("`columns`", "{text: ...}", _text_column),
    "dataset_num_proc": SPEED,
    "dataset_kwargs": SPEED,
    "max_length": same("cutoff_len", whole, "an answer is never cut here: see `too_long`"),
    "max_seq_length": same("cutoff_len", whole, "an answer is never cut here: see `too_long`"),
    "truncation_mode": own("see `too_long`"),
    "packing": packed_rows("max_length", 1024),
    "packing_strategy": own("see `packing`"),
    "padding_free": own("always so here"),
    "eval_packing": own("a score does not depend on it"),
    "completion_only_loss": by("`train_on`", "responses", _answers_only),
    "assistant_only_loss": by("`train_on`", "responses", _answers_only),
    "chat_template": left("the model's own chat template is used; put this one into the tokenizer"),
    "chat_template_path": left(
        "the model's own chat template is used; put this one into the tokenizer"
    ),
    "eos_token": own("an answer ends as its template ends it"),
    "pad_token": own("padding never carries loss"),
    "loss_type": left("the loss is plain cross-entropy here", "nll"),
    "activation_offloading": RECOMPUTE,
}
TRL_DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "learning_rate": 2e-5,
    "method": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    # Not written, PEFT adapts these two of a Llama-like model.
    "target_modules": ["q_proj", "v_proj"],
    "cutoff_len": 1024,
}
UNSLOTH_KEYS: dict[str, Rule] = {
    **TRL_KEYS,
    **_LORA,
    "model_name": same("model"),
    "dataset": same("data"),
    "random_state": own("`seed` decides how adapters start too"),
    "use_gradient_checkpointing": RECOMPUTE,
    "full_finetuning": left(FULL),
    "hub_path": HUB,
    "save_model": own("a run always keeps its adapter"),
    "save_path": HUB,
    "save_method": own("`lorakit export RUN --to merged`"),
    "save_gguf": own("`lorakit export RUN --to gguf --quant Q8_0`"),
    "quantization": own("`lorakit export RUN --to gguf --quant Q8_0`"),
    "push_model": HUB,
    "push_gguf": HUB,
    "token": TOKEN,
    "fast_inference": KERNELS,
}
UNSLOTH_DEFAULTS: dict[str, Any] = {
    **TRL_DEFAULTS,
    "learning_rate": 2e-4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": SEVEN,
    "cutoff_len": 2048,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "optimizer": "adamw_8bit",
    "weight_decay": 0.01,
    "seed": 3407,
}
# Further fields of LoraConfig, which no recipe of lorakit sets.
_UNSET = (
    "trainable_token_indices", "lora_ga_config", "velora_config", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "monteclora_config", "layer_replication", "lora_bias",
    "target_parameters", "arrow_config", "kasa_config", "ensure_weight_tying",
)  # fmt: skip
PEFT_KEYS: dict[str, Rule] = {
    **_LORA,
    **dict.fromkeys(_UNSET, left("a setting of peft that no recipe has")),
    "base_model_name_or_path": same("model"),
    "revision": same("revision"),
    "rank_pattern": same("rank_pattern", lambda value: value),
    "alpha_pattern": same("alpha_pattern", lambda value: value),
    "init_lora_weights": by("`init_lora_weights`", "", _init),
    "peft_type": own("LORA"),
    "task_type": own("a causal language model"),
    "inference_mode": own("no setting of what is trained"),
    "fan_in_fan_out": own("the model's own configuration says it"),
    "peft_version": own("no setting of what is trained"),
    "auto_mapping": own("no setting of what is trained"),
    "qalora_group_size": own("belongs to use_qalora"),
    "runtime_config": own("no setting of what is trained"),
    "eva_config": own("read by its own scheme of `init_lora_weights`"),
    "corda_config": own("read by its own scheme of `init_lora_weights`"),
    "layers_pattern": left("`layers_to_transform` finds the layers by their usual name"),
    "megatron_config": own("no setting of what is trained"),
    "megatron_core": own("no setting of what is trained"),
}
TRL = Tool("TRL", TRL_KEYS, TRL_DEFAULTS, _begin_trl)
UNSLOTH = Tool("Unsloth", UNSLOTH_KEYS, UNSLOTH_DEFAULTS, _begin_unsloth)
PEFT = Tool("PEFT", PEFT_KEYS, {}, _begin_peft)
