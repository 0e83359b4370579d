"""Known facts about each model family: default LoRA targets and logit scaling.

A family is one row of FAMILIES, keyed by `config.model_type`. Models of an unknown family get
adapters on all linear layers, and the run reports it.
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
    # Experts are raw parameters or hundreds of small layers, so only attention gets adapters.
    "mixtral": _ATTENTION,
    "qwen2_moe": _ATTENTION,
    "qwen3_moe": _ATTENTION,
}

# Families with Llama's decoder layer, for which `engine/decoder_layer.py` has hand-written
# gradients; a self-test compares them before training.
FAST_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"}


def lora_targets(config: Any) -> tuple[str | list[str], str]:
    """Target modules for `target_modules: auto`, and a short reason."""
    family = getattr(config, "model_type", "")
    if family in FAMILIES:
        return list(FAMILIES[family]), f"model family {family}"
    return (
        "all-linear",
        f"model family {family or 'unknown'} is not in the table: all linear layers",
    )


def changes_logits(config: Any) -> bool:
    """Return True if `transform_logits` changes the logits of this family."""
    import torch

    probe = torch.tensor([1.0, -2.0])
    return not torch.equal(transform_logits(config, probe), probe)


def transform_logits(config: Any, logits: Any) -> Any:
    """Apply the soft cap or scale that some families put after the head.

    Gemma 2 caps (`final_logit_softcapping`), Cohere multiplies (`logit_scale`), Granite divides
    (`logits_scaling`). `logits` is [..., V], and so is the result.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = (logits / cap).tanh() * cap
    if getattr(config, "logit_scale", None) and config.model_type.startswith("cohere"):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) and config.model_type.startswith("granite"):
        logits = logits / config.logits_scaling
    return logits
