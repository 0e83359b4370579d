"""The `adapter` format: a PEFT folder with tokenizer and template, and adapters with folded scale.

Engines disagree on scales: llama.cpp and SGLang read only alpha / rank and silently ignore rsLoRA's
square root and alpha patterns. In a folded adapter B contains the scale and alpha equals the rank,
so every engine computes the same update.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lorakit.errors import WorkError
from lorakit.export.checkpoint_keys import check_predictions, declared_class, require_fit
from lorakit.export.finite import DAMAGED, require_finite
from lorakit.export.hf_files import write_tokenizer
from lorakit.export.merged import memory_missing
from lorakit.export.tuned_run import Job, TunedRun, float32_model, scale_of
from lorakit.export.verify_outputs import agreement, check_exported_tokenizer, make_reference
from lorakit.storage.atomic_dir import atomic_directory
from lorakit.storage.run_dir import ADAPTER_WEIGHTS

# PEFT's layout of all experts in two matrices is one that engines read differently, or not at all
# (vllm#41384, #52194, sglang#25528); none was tried here.
EXPERTS_IN_PEFT = "its experts are adapted in PEFT's target_parameters, which only PEFT reads"


def export_adapter(job: Job) -> dict[str, Any]:
    """Write the adapter, tokenizer and template for PEFT, then load and verify them.

    Raises:
        ModelError: the class that the base's config.json names cannot use the adapter.
        WorkError: the written adapter does not load, or predicts differently from the run's.
    """
    source = job.source
    require_fit(source)
    with atomic_directory(job.target) as folder:
        copy_adapter(source, folder)
        check_exported_tokenizer(source, folder)
        short = memory_missing(source)
        if short and job.verify:
            job.console.print(f"not compared with the run's adapter: {short}")
        if short or not job.verify:
            facts: dict[str, Any] = {"skipped": short or "disabled by --no-verify"}
        else:
            facts = _verify(source, folder)
    job.next_steps.append(f"load it with: PeftModel.from_pretrained(base, {str(job.target)!r})")
    return facts


def copy_adapter(source: TunedRun, folder: Path) -> None:
    """Copy config, weights, tokenizer and template without local paths.

    Raises:
        WorkError: a weight is NaN or infinite.
    """
    for name, tensor in source.adapter_tensors().items():
        require_finite(tensor, name, DAMAGED)
    values = {**source.adapter, "base_model_name_or_path": source.base_name}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(source.run.adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    write_tokenizer(source, folder)


def why_not_portable(source: TunedRun) -> str | None:
    """Reason why engines with plain LoRA cannot load this adapter, or None."""
    reason = beyond_updates(source)
    names = " ".join(source.names)
    if reason is None and ("embed_tokens" in names or "lm_head" in names):
        return "it adapts the embedding or the head"
    return reason or (EXPERTS_IN_PEFT if source.adapter.get("target_parameters") else None)


def beyond_updates(source: TunedRun) -> str | None:
    """Reason why this adapter is more than low-rank updates of frozen weights, or None."""
    config = source.adapter
    if config.get("use_dora"):
        return "DoRA scales the complete weight, not only its update"
    if config.get("modules_to_save"):
        return f"modules_to_save: {', '.join(config['modules_to_save'])} were trained in full"
    if config.get("trainable_token_indices"):
        return "rows of single tokens were trained"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it trained biases"
    if source.base_changing_init:
        return f"init_lora_weights: {source.base_changing_init} changed the base"
    return None


def fold_adapter(source: TunedRun, folder: Path) -> float:
    """Write the adapter with its scale in B and alpha = rank; return the largest rank.

    Modules of lower rank are padded with zeros, so that all have the same rank.
    """
    import torch
    from safetensors.torch import save_file

    tensors = source.adapter_tensors()
    ranks = [t.shape[0] for n, t in tensors.items() if n.endswith("lora_A.weight")]
    rank = max(ranks)
    folded = {}
    for name, tensor in tensors.items():
        require_finite(tensor, name, DAMAGED)
        value = tensor.float()
        if name.endswith("lora_B.weight"):
            value = value * scale_of(source.adapter, name, value.shape[1])
            value = torch.nn.functional.pad(value, (0, rank - value.shape[1]))
        elif name.endswith("lora_A.weight"):
            value = torch.nn.functional.pad(value, (0, 0, 0, rank - value.shape[0]))
        folded[name] = value.contiguous()
    save_file(folded, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    values = {
        **source.adapter,
        "base_model_name_or_path": source.base_name,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n")
    return rank


def _verify(source: TunedRun, folder: Path) -> dict[str, Any]:
    live = float32_model(source)
    reference = make_reference(source, live)
    live.load_adapter(str(folder), "exported")
    live.set_adapter("exported")
    result = agreement(
        reference, live, "the adapter as written", base_kl_per_token=reference.base_kl
    )
    if not result.kl_per_token <= 1e-6:
        raise WorkError(
            f"the written adapter differs from the run's (KL {result.kl_per_token:.1e}, "
            "expected at most 1e-6); not kept",
            hint="check the disk, then export again",
        )
    del live
    facts = result.as_dict()
    if other := declared_class(source.config):
        kl = check_predictions(source, reference, folder, other)
        facts |= {"other_class": other.__name__, "other_class_kl_per_token": kl}
    return facts
