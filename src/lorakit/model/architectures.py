"""A model's config enters; what lorakit knows about its family leaves: LoRA targets, logit scaling.

A family is one row of FAMILIES, keyed by `config.model_type`. An unknown one is trained on all its
linear layers, and the run says so.
"""

from __future__ import annotations

from typing import Any

_LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "ministral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "granite": _LLAMA_LIKE,
    "cohere": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "starcoder2": (*_ATTENTION, "c_fc", "c_proj"),
    # Experts are raw parameters or hundreds of small layers: attention is what pays.
    "mixtral": _ATTENTION,
    "qwen2_moe": _ATTENTION,
    "qwen3_moe": _ATTENTION,
}

# Decoder layers of Llama's shape, which `engine/decoder_layer.py` computes by hand (and a probe
# confirms).
FAST_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"}


def lora_targets(config: Any) -> tuple[str | list[str], str]:
    """Target modules for `target_modules: auto`, and the reason in a few words."""
    family = getattr(config, "model_type", "")
    if family in FAMILIES:
        return list(FAMILIES[family]), f"model family {family}"
    return (
        "all-linear",
        f"model family {family or 'unknown'} is not in the table: all linear layers",
    )


def changes_logits(config: Any) -> bool:
    """Whether `transform_logits` does anything for this family."""
    import torch

    probe = torch.tensor([1.0, -2.0])
    return not torch.equal(transform_logits(config, probe), probe)


def transform_logits(config: Any, logits: Any) -> Any:
    """What some families do to logits after the head: soft caps and scales.

    Gemma 2 caps (`final_logit_softcapping`), Cohere multiplies (`logit_scale`), Granite divides
    (`logits_scaling`). `logits` [..., V] comes back in the same shape.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = (logits / cap).tanh() * cap
    if getattr(config, "logit_scale", None) and config.model_type.startswith("cohere"):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) and config.model_type.startswith("granite"):
        logits = logits / config.logits_scaling
    return logits
