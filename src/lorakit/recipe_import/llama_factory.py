"""A key of a LLaMA-Factory recipe enters; what lorakit does with it leaves.

Read in LLaMA-Factory's `hparams` (2026-08) and its examples. Data sets are names there, looked up
in `dataset_info.json`: where that file lies beside the recipe, they become files and hub ids.
"""

from __future__ import annotations

import json
from pathlib import Path
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
    is_off,
    is_on,
    left,
    number,
    own,
    same,
    switch,
    whole,
    words,
)
from lorakit.recipe_import.trainer import (
    ATTENTION,
    BFLOAT16,
    FULL,
    HUB,
    KERNELS,
    RECOMPUTE,
    SHARDING,
    SPEED,
    TOKEN,
    TRAINER,
    TRAINER_DEFAULTS,
    packed_rows,
)

LARGEST_INFO = 2**24
# Templates of its own that are no model's: with these a base model is taught another manner.
PLAIN_TEMPLATES = {"default", "empty", "alpaca", "vicuna", "fewshot"}
# Its words for the parts of a row -> ours.
PARTS = {
    "prompt": "instruction",
    "query": "input",
    "response": "response",
    "system": "system",
    "history": "history",
    "messages": "messages",
    "tools": "tools",
}
TURNS = {"role", "content", "from", "value"}
USUAL = {"instruction", "input", "output", "response", "system", "history", "tools",
         "messages", "conversations", "text"}  # fmt: skip


def _method(value: Any, draft: Draft) -> Said:
    if value != "lora":
        return Said("left", note=f"{value}: {FULL}")
    return Said("own", note="`method` says it")


def _bits(value: Any, draft: Draft) -> Said:
    if whole(value) == 4:
        return Said("taken", {"method": "qlora"})
    raise Unfit(f"{value} bits: the base is 16-bit here, or 4-bit with `method: qlora`")


def _target(value: Any, draft: Draft) -> Said:
    names = words(value)
    return Said("taken", {"target_modules": "all-linear" if names == ["all"] else names})


def _pissa(value: Any, draft: Draft) -> Said:
    if is_off(value):
        return Said("own", note="off")
    rounds = whole(draft.source.get("pissa_iter", 16))
    return Said("taken", {"init_lora_weights": "pissa" if rounds < 0 else f"pissa_niter_{rounds}"})


def _template(value: Any, draft: Draft) -> Said:
    if str(value).lower() in PLAIN_TEMPLATES:
        raise Unfit(f"{value}: the model's own chat template is used; see `lorakit inspect`")
    return Said("own", note="the model's own chat template is used; see `lorakit inspect`")


def _train_on(value: str) -> Rule:
    def read(given: Any, draft: Draft) -> Said:
        if is_off(given):
            return Said("own", note="off, as here")
        return Said("taken", {"train_on": value})

    return by("`train_on`", value, read)


def _stage(value: Any, draft: Draft) -> Said:
    if value == "pt":
        return Said("taken", {"documents": "completion"}, "rows with a column `text` train whole")
    return Said("own", note="answers are trained")


def _datasets(value: Any, draft: Draft) -> Said:
    sources, columns = _look_up(words(value), draft)
    values: dict[str, Any] = {"data": sources[0] if len(sources) == 1 else sources}
    if columns:
        values["columns"] = columns
    return Said("taken", values)


def _held_out_data(value: Any, draft: Draft) -> Said:
    sources, _ = _look_up(words(value), draft)
    if len(sources) != 1:
        raise Unfit("`val_data` is one source: put the files into one folder")
    return Said("taken", {"val_data": sources[0]})


def _look_up(names: list[str], draft: Draft) -> tuple[list[str], dict[str, str]]:
    """The sources behind the names, and the columns if all of them agree on these."""
    place = str(draft.source.get("dataset_dir") or "data")
    files = [folder / "dataset_info.json" for folder in (Path(place), draft.folder / place)]
    info = next((file for file in files if file.is_file()), None)
    if info is None:
        where = f"{place}/dataset_info.json is not here, so what file a name means is not known"
        draft.leave("dataset_info.json", f"{where}: write the files or hub ids into `data`")
        return names, {}
    known = _read_info(info)
    sources, found = [], []
    for name in names:
        entry = known.get(name)
        if not isinstance(entry, dict):
            draft.leave(f"dataset {name}", f"not in {info.name}: correct `data`")
            sources.append(name)
            continue
        sources.append(_source(name, entry, info.parent, draft))
        found.append(_columns(name, entry, draft))
    first = found[0] if found else {}
    if any(columns != first for columns in found):
        draft.leave(
            "columns",
            "the data sets name their columns differently, and `columns` is one for all: rename "
            "them in the files",
        )
        return sources, {}
    return sources, first


def _read_info(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as handle:
            found = json.loads(handle.read(LARGEST_INFO))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"{path}: cannot be read: {str(error)[:200]}",
            hint="mend it, or move it away: then names stay names",
        ) from error
    return found if isinstance(found, dict) else {}


def _source(name: str, entry: dict[str, Any], folder: Path, draft: Draft) -> str:
    """A file below the folder, or a hub id with configuration and split."""
    if entry.get("ranking"):
        draft.leave(f"dataset {name}", "preference data: it holds no answers to train on")
    for key in ("num_samples", "script_url", "cloud_file_name"):
        if entry.get(key):
            draft.leave(f"dataset {name}: {key}", "not read by lorakit")
    if isinstance(entry.get("file_name"), str):
        return str(folder / entry["file_name"])
    return hub_id(entry.get("hf_hub_url") or name, entry.get("subset"), entry.get("split"))


def _columns(name: str, entry: dict[str, Any], draft: Draft) -> dict[str, str]:
    """Our parts for its columns, where the names are not found without being told."""
    given, tags = entry.get("columns"), entry.get("tags")
    given = given if isinstance(given, dict) else {}
    tags = tags if isinstance(tags, dict) else {}
    for part in sorted(given.keys() - PARTS.keys()):
        draft.leave(f"dataset {name}: {part}", "lorakit trains on text only")
    if {tags.get("role_tag", "from"), tags.get("content_tag", "value")} - TURNS:
        note = "a turn has role and content, or from and value: rename them in the file"
        draft.leave(f"dataset {name}: tags", note)
    if draft.source.get("stage") == "pt":
        column = str(given.get("prompt") or "text")
        return {} if column == "text" else {"text": column}
    named = {PARTS[p]: str(c) for p, c in given.items() if p in PARTS and isinstance(c, str)}
    return named if set(named.values()) - USUAL else {}


def _begin(draft: Draft) -> None:
    stage = draft.source.get("stage", "sft")
    if stage not in ("sft", "pt"):
        raise RecipeError(
            f"stage: {stage}: lorakit trains on answers (sft) and on texts (pt) only",
            hint="there is no recipe for this; keep LLaMA-Factory for it",
        )
    if stage == "pt" and draft.source.get("packing") is None:
        packed = KEYS["packing"].read(True, draft)  # its own choice for texts
        draft.leave("packing (not written)", packed.note)
    if is_off(draft.source.get("dataset")):
        raise RecipeError(
            "no `dataset`: this LLaMA-Factory file is for chat, export or evaluation",
            hint="after training: lorakit chat RUN, lorakit export RUN --to merged",
        )


MODAL = left("lorakit trains on text only")
OTHER_METHOD = left("lorakit has LoRA and QLoRA only")
PREFERENCE = own("belongs to a stage that this recipe does not use")
_BADAM = (
    "start_block",
    "mode",
    "switch_mode",
    "switch_interval",
    "update_ratio",
    "mask_mode",
    "verbose",
)
_RANKED = ("target", "rank", "update_interval", "scale", "layerwise")
RAY = ("ray_run_name", "ray_storage_path", "ray_num_workers", "ray_init_kwargs",
       "placement_strategy", "resources_per_worker")  # fmt: skip
PARTS_OF_OTHERS = (
    *(f"freeze_{part}" for part in ("trainable_layers", "trainable_modules", "extra_modules")),
    *(f"badam_{part}" for part in _BADAM),
    *(f"{name}_{part}" for name in ("galore", "apollo") for part in _RANKED),
)

KEYS: dict[str, Rule] = {
    **TRAINER,
    "model_name_or_path": same("model"),
    "model_revision": same("revision"),
    "adapter_name_or_path": left(
        "a run starts from new adapters: merge this one into the base first"
    ),
    "quantization_bit": by("`method`", "4: qlora; 8 has no match", _bits),
    "quantization_method": left("4-bit is bitsandbytes' NF4 here", "bitsandbytes", "bnb"),
    "quantization_type": left("4-bit is NF4 here", "nf4"),
    "double_quantization": by(
        "",
        "always on here",
        lambda value, draft: Said("own" if is_on(value) else "left", note="always on here"),
    ),
    "finetuning_type": by("`method`", "lora; others: " + FULL, _method),
    "stage": by("`documents`", "sft; pt: texts; others are refused", _stage),
    "lora_rank": same("lora_r", whole),
    "lora_alpha": same("lora_alpha", figure),
    "lora_dropout": same("lora_dropout", number),
    "lora_target": by("`target_modules`", "all: all-linear", _target),
    "additional_target": same("modules_to_save", words),
    "use_dora": switch("use_dora"),
    "use_rslora": switch("use_rslora"),
    "pissa_init": by("`init_lora_weights`", "pissa_niter_16, by pissa_iter", _pissa),
    "pissa_iter": own("read with `pissa_init`"),
    "pissa_convert": own("an adapter is saved as PEFT saves it; `lorakit export` merges it"),
    "loraplus_lr_ratio": left("both factors have one rate here; try a higher `learning_rate`"),
    "create_new_adapter": own("an adapter is always a new one"),
    "dataset": by("`data`, `columns`", "names, looked up in dataset_info.json", _datasets),
    "eval_dataset": by("`val_data`", "", _held_out_data),
    "dataset_dir": own("read with `dataset`"),
    "template": by("", "the model's own chat template is used", _template),
    "enable_thinking": own("follows the data: on where answers hold <think>"),
    "cutoff_len": same("cutoff_len", whole, "an answer is never cut here: see `too_long`"),
    "train_on_prompt": _train_on("all"),
    "mask_history": _train_on("last"),
    "val_size": same("val_size", held_out),
    "max_samples": left("all rows are trained: shorten the file, or set `max_steps`"),
    "packing": packed_rows("cutoff_len", 2048),
    "neat_packing": packed_rows("cutoff_len", 2048),
    "mix_strategy": left("sources are joined; give each a `weight`", "concat"),
    "interleave_probs": left("a `weight` says how often an epoch sees each row, not a probability"),
    "streaming": own("rows are read as a stream, and large hub data is not downloaded whole"),
    "tool_format": own("the model's template writes the calls"),
    "default_system": same("system"),
    "flash_attn": ATTENTION,
    "enable_liger_kernel": KERNELS,
    "use_unsloth": KERNELS,
    "use_unsloth_gc": RECOMPUTE,
    "use_v1_kernels": KERNELS,
    "disable_gradient_checkpointing": RECOMPUTE,
    "use_reentrant_gc": RECOMPUTE,
    "upcast_layernorm": own("norms are computed in float32 here"),
    "pure_bf16": BFLOAT16,
    "torch_dtype": own("see `dtype`"),
    "rope_scaling": left("the model's own context is used"),
    "shift_attn": left("attention is not shifted here"),
    "resize_vocab": left("no token is added: use a model that has them"),
    "add_tokens": left("no token is added: use a model that has them"),
    "add_special_tokens": left("no token is added: use a model that has them"),
    "use_dft_loss": left("the loss is plain cross-entropy here"),
    "use_muon": OTHER_METHOD,
    "use_galore": OTHER_METHOD,
    "use_apollo": OTHER_METHOD,
    "use_badam": OTHER_METHOD,
    "use_adam_mini": OTHER_METHOD,
    "use_llama_pro": OTHER_METHOD,
    "mixture_of_depths": OTHER_METHOD,
    "disable_shuffling": left("rows are shuffled by `seed`"),
    "early_stopping_steps": left("a run ends by `epochs` or `max_steps`"),
    "freeze_vision_tower": MODAL,
    "freeze_multi_modal_projector": MODAL,
    "image_max_pixels": MODAL,
    "video_max_pixels": MODAL,
    "media_dir": MODAL,
    "plot_loss": own("the run's report draws it from metrics.jsonl"),
    "overwrite_cache": SPEED,
    "preprocessing_num_workers": SPEED,
    "preprocessing_batch_size": SPEED,
    "tokenized_path": SPEED,
    "buffer_size": SPEED,
    "cache_dir": own("the hub's own cache is used (HF_HOME)"),
    "use_fast_tokenizer": SPEED,
    "low_cpu_mem_usage": SPEED,
    "split_special_tokens": own("special tokens written in a turn stay text here"),
    "ignore_pad_token_for_loss": own("padding never carries loss"),
    "include_num_input_tokens_seen": own("tokens are in metrics.jsonl"),
    "include_effective_tokens_per_second": own("tokens/s are in metrics.jsonl"),
    "compute_accuracy": own("`lorakit eval RUN` scores held-out rows"),
    "infer_backend": own("`lorakit serve RUN`"),
    "hf_hub_token": TOKEN,
    "ms_hub_token": TOKEN,
    "om_hub_token": TOKEN,
    "use_swanlab": left("lorakit reports to tensorboard, wandb, mlflow or trackio"),
    "swanlab_api_key": TOKEN,
    "export_dir": HUB,
    **dict.fromkeys(RAY, SHARDING),
    **dict.fromkeys(PARTS_OF_OTHERS, own("belongs to a method that lorakit does not have")),
    "pref_beta": PREFERENCE,
    "pref_loss": PREFERENCE,
}

DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "method": "lora",
    "lora_r": 8,
    "lora_alpha": lambda draft: 2 * draft.values.get("lora_r", 8),
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "cutoff_len": 2048,
    "val_size": 0,
    "save_every": 500,
}
LLAMA_FACTORY = Tool("LLaMA-Factory", KEYS, DEFAULTS, _begin)
