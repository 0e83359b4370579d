"""Configs of known models by name, from published values, without a download."""

from __future__ import annotations

from typing import Any

from lorakit.errors import RecipeError
from lorakit.recipe.loader import suggest


def _decoder(
    model_type: str,
    sizes: tuple[int, int, int, int, int],
    vocabulary: int,
    context: int,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Config values; `sizes` are hidden size, inner size, layers, query heads, key heads."""
    width, inner, layers, heads, key_heads = sizes
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        **more,
    }


# Values of each model's published config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _decoder("llama", (4096, 11008, 32, 32, 32), 32000, 4096),
    "llama-2-13b": _decoder("llama", (5120, 13824, 40, 40, 40), 32000, 4096),
    "llama-3.1-8b": _decoder("llama", (4096, 14336, 32, 32, 8), 128256, 131072),
    "llama-3.2-1b": _decoder("llama", (2048, 8192, 16, 32, 8), 128256, 131072, True, head_dim=64),
    "llama-3.3-70b": _decoder("llama", (8192, 28672, 80, 64, 8), 128256, 131072),
    "mistral-7b": _decoder("mistral", (4096, 14336, 32, 32, 8), 32768, 32768, sliding_window=None),
    "qwen2.5-7b": _decoder("qwen2", (3584, 18944, 28, 28, 4), 152064, 32768),
    "qwen3-0.6b": _decoder("qwen3", (1024, 3072, 28, 16, 8), 151936, 40960, True, head_dim=128),
    "qwen3-8b": _decoder("qwen3", (4096, 12288, 36, 32, 8), 151936, 40960, head_dim=128),
    "qwen3-30b-a3b": _decoder(
        "qwen3_moe",
        (2048, 6144, 48, 32, 4),
        151936,
        40960,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "gemma-7b": _decoder("gemma", (3072, 24576, 28, 16, 16), 256000, 8192, True, head_dim=256),
    "gemma-2-9b": _decoder(
        "gemma2",
        (3584, 14336, 42, 16, 8),
        256000,
        8192,
        True,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    ),
    "tinyllama-1.1b": _decoder("llama", (2048, 5632, 22, 32, 4), 32000, 2048),
    "smollm2-135m": _decoder("llama", (576, 1536, 30, 9, 3), 49152, 8192, True),
    "tiny": _decoder("llama", (64, 128, 2, 4, 2), 512, 2048),
}

# Repositories with these shapes: if gated or unreachable they can still be planned.
REPOSITORIES: dict[str, str] = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2-7b",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-2-13b-chat-hf": "llama-2-13b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b",
    "mistralai/Mistral-7B-v0.3": "mistral-7b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b",
    "Qwen/Qwen2.5-7B": "qwen2.5-7b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
    "Qwen/Qwen3-0.6B": "qwen3-0.6b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "google/gemma-7b-it": "gemma-7b",
    "google/gemma-2-9b-it": "gemma-2-9b",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "demo": "smollm2-135m",
}


def shape_config(name: str) -> Any:
    """The transformers config of a named shape.

    Raises:
        RecipeError: the name is not in the table.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise RecipeError(
            f"--shape {name}: unknown{suggest(name, SHAPES)}", hint=f"shapes: {', '.join(SHAPES)}"
        )
    return AutoConfig.for_model(**SHAPES[name])
