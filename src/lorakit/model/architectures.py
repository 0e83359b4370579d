"""Known facts about each model family: default LoRA targets and logit scaling.

A family is one row of FAMILIES, keyed by the `model_type` of the text model's config. A family
without a row gets adapters on all linear layers of its text decoder, and the run reports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """Linear layers of the decoder that get adapters by default, and those that get none."""

    targets: tuple[str, ...]  # last components of names; one that a model lacks is left out
    without: str = ""  # layers without an adapter, and why
    # peft 0.21 (`_convert_peft_config_moe`) turns every `gate_proj`, `up_proj` and `down_proj` of
    # the family into its fused experts; other MLPs cannot be chosen without them.
    names_experts: bool = False


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LLAMA_LIKE = Family((*_ATTENTION, *_MLP))
# DeepSeek's attention: projections to a narrow space and back.
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

# Layers of the MLPs that every token passes, by any family's name: left out with
# `expert_adapters: none`.
MLPS = {*_MLP, "gate_up_proj", "input_linear", "output_linear", "w1", "w2", "w3"}
# PEFT refuses it for Falcon-H1 and Nemotron-H for this reason.
_MAMBA = "Mamba's out_proj gets none: its kernels multiply by the weight, past an adapter"

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2"),
            *("gemma3_text", "smollm3", "granite", "cohere", "cohere2", "olmo", "olmo2", "olmo3"),
            *("stablelm", "exaone4", "seed_oss", "hunyuan_v1_dense", "muse_glimmer_text"),
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "gemma3n_text"),
        ),
        _LLAMA_LIKE,
    ),
    "phi3": Family(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "phi": Family(("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "glm4": Family((*_ATTENTION, "gate_up_proj", "down_proj")),
    "gpt2": Family(("c_attn", "c_proj", "c_fc")),
    "gpt_neox": Family(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "falcon": Family(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "starcoder2": Family((*_ATTENTION, "c_fc", "c_proj")),
    # Three layers of gated delta rule to one of softmax attention. The delta rule's two gates
    # (in_proj_a, in_proj_b) have one output per head.
    "qwen3_5_text": Family((*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj", *_MLP)),
    "lfm2": Family(("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3")),
    # Mixtures of experts; transformers 5 keeps the experts of a layer in raw tensors.
    "mixtral": Family(_ATTENTION),
    "qwen2_moe": Family(_ATTENTION, names_experts=True),
    "qwen3_moe": Family(_ATTENTION),
    "qwen3_vl_moe_text": Family(_ATTENTION),
    "qwen3_next": Family((*_ATTENTION, "in_proj_qkvz", "out_proj"), names_experts=True),
    "qwen3_5_moe_text": Family((*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj", *_MLP)),
    "gpt_oss": Family(_ATTENTION),
    "gemma4_text": Family((*_ATTENTION, *_MLP)),
    "llama4_text": Family((*_ATTENTION, *_MLP)),
    "glm4_moe": Family(_ATTENTION, names_experts=True),
    "glm4_moe_lite": Family(_LATENT, names_experts=True),
    "deepseek_v2": Family(_LATENT, names_experts=True),
    "deepseek_v3": Family(_LATENT, names_experts=True),
    "mistral4": Family((*_LATENT, *_MLP)),
    # Kimi's delta rule, and latent attention over positions that an indexer picks.
    "glm5_next_text": Family(
        ("k_proj", "v_proj", *_LATENT, *_MLP),
        "the indexer gets none: its choice has no gradient",
    ),
    # State space layers, some beside attention.
    "falcon_h1": Family((*_ATTENTION, *_MLP, "in_proj"), _MAMBA),
    "granitemoehybrid": Family((*_ATTENTION, "input_linear", "output_linear", "in_proj"), _MAMBA),
    # `up_proj` and `down_proj` are those of shared experts; the routed ones are raw tensors.
    "nemotron_h": Family((*_ATTENTION, "up_proj", "down_proj", "in_proj"), _MAMBA),
}

# Families with Llama's decoder layer, for which `engine/decoder_layer.py` has hand-written
# gradients; a self-test compares them before training.
FAST_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"}

# Families whose own layers are compiled in training (`engine/compiled_layers.py`) by default: those
# measured on an H200: Gemma 3 12B from 3,848 tokens/s to 9,182, Qwen3.5-9B 13,820, Qwen3-30B-A3B
# (QLoRA, all experts adapted) from 6,462.
COMPILED_FAMILIES = {"gemma3_text", "qwen3_5_text", "qwen3_moe"}

# transformers 5.23 makes their attention masks without position ids, so packed documents need a
# mask from lorakit. gpt-oss is not among them: its eager attention computes T * T scores.
MASKS_WITHOUT_POSITIONS = {"granitemoehybrid"}


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
