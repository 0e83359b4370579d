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


def _wrapper(
    model_type: str, class_name: str, text: dict[str, Any], vision: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Config values of a model with towers; `text` is made by `_decoder`."""
    tied = text["tie_word_embeddings"]
    values = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    return {"model_type": model_type, "architectures": [class_name], **values, **more}


def _qwen3_5(
    sizes: tuple[int, int, int, int, int],
    value_heads: int,
    tied: bool = False,
    vision: tuple[int, int, int] = (27, 1152, 4304),
) -> dict[str, Any]:
    """Config values of Qwen3.5, 3.6 or 3.8; `vision` is the tower's depth, width, inner width."""
    depth, width, inner = vision
    text = _decoder("qwen3_5_text", sizes, 248320, 262144, tied, head_dim=256)
    text["linear_num_value_heads"] = value_heads
    tower = {"depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": 16}
    name = "Qwen3_5ForConditionalGeneration"
    return _wrapper("qwen3_5", name, text, {**tower, "out_hidden_size": sizes[0]})


def _gemma3(sizes: tuple[int, int, int, int, int]) -> dict[str, Any]:
    text = _decoder("gemma3_text", sizes, 262208, 131072, True, head_dim=256, sliding_window=1024)
    tower = _tower(1152, 4304, 27, image_size=896, patch_size=14, vision_use_head=False)
    return _wrapper("gemma3", "Gemma3ForConditionalGeneration", text, tower)


def _gemma4(
    sizes: tuple[int, int, int, int, int], context: int, audio: bool = False, **more: Any
) -> dict[str, Any]:
    text = _decoder("gemma4_text", sizes, 262144, context, True, head_dim=256, **more)
    small, large = _tower(768, 3072, 16, 12), _tower(1152, 4304, 27, head_dim=72, standardize=True)
    vision = small if audio else large
    heard: dict[str, Any] | None = {} if audio else None
    name = "Gemma4ForConditionalGeneration"
    return _wrapper("gemma4", name, text, vision, audio_config=heard)


def _tower(width: int, inner: int, layers: int, heads: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        **more,
    }


# Gemma 4 without inputs for each layer, whose global layers use keys as values.
_GEMMA4_LARGE: dict[str, Any] = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
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
    "qwen3-4b": _decoder("qwen3", (2560, 9728, 36, 32, 8), 151936, 40960, True, head_dim=128),
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
    "gemma-3-4b": _gemma3((2560, 10240, 34, 8, 4)),
    "gemma-3-12b": _gemma3((3840, 15360, 48, 16, 8)),
    "gemma-4-e4b": _gemma4((2560, 10240, 42, 8, 2), 131072, audio=True, num_kv_shared_layers=18),
    "gemma-4-26b-a4b": _gemma4(
        (2816, 2112, 30, 16, 8),
        262144,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        **_GEMMA4_LARGE,
    ),
    "gemma-4-31b": _gemma4(
        (5376, 21504, 60, 32, 16), 262144, num_global_key_value_heads=4, **_GEMMA4_LARGE
    ),
    "qwen3.5-4b": _qwen3_5((2560, 9216, 32, 16, 4), 32, True, vision=(24, 1024, 4096)),
    "qwen3.5-9b": _qwen3_5((4096, 12288, 32, 16, 4), 32),
    "qwen3.8-27b": _qwen3_5((5120, 17408, 64, 24, 4), 48),
    "qwen3.6-35b-a3b": _wrapper(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        _decoder(
            "qwen3_5_moe_text",
            (2048, 512, 40, 16, 2),
            248320,
            262144,
            head_dim=256,
            num_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 2048},
    ),
    "gpt-oss-20b": _decoder(
        "gpt_oss",
        (2880, 2880, 24, 64, 8),
        201088,
        131072,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        quantization_config={"quant_method": "mxfp4"},
    ),
    "ministral-3-8b": _wrapper(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        _decoder("ministral3", (4096, 14336, 34, 32, 8), 131072, 262144, head_dim=128),
        {"model_type": "pixtral", **_tower(1024, 4096, 24, head_dim=64, patch_size=14)},
    ),
    "glm-4.7-flash": _decoder(
        "glm4_moe_lite",
        (2048, 10240, 47, 20, 20),
        154880,
        202752,
        moe_intermediate_size=1536,
        n_routed_experts=64,
        num_experts_per_tok=4,
        q_lora_rank=768,
        kv_lora_rank=512,
    ),
    "tinyllama-1.1b": _decoder("llama", (2048, 5632, 22, 32, 4), 32000, 2048),
    "smollm2-135m": _decoder("llama", (576, 1536, 30, 9, 3), 49152, 8192, True),
    "tiny": _decoder("llama", (64, 128, 2, 4, 2), 512, 2048),
    "tiny-moe": _decoder(
        "qwen3_moe",
        (64, 128, 2, 4, 2),
        512,
        2048,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
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
    "Qwen/Qwen3-4B": "qwen3-4b",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "google/gemma-7b-it": "gemma-7b",
    "google/gemma-2-9b-it": "gemma-2-9b",
    "google/gemma-3-4b-it": "gemma-3-4b",
    "google/gemma-3-12b-it": "gemma-3-12b",
    "google/gemma-4-E4B-it": "gemma-4-e4b",
    "google/gemma-4-26B-A4B-it": "gemma-4-26b-a4b",
    "google/gemma-4-31B-it": "gemma-4-31b",
    "Qwen/Qwen3.5-4B": "qwen3.5-4b",
    "Qwen/Qwen3.5-9B": "qwen3.5-9b",
    "Qwen/Qwen3.6-27B": "qwen3.8-27b",
    "Qwen/Qwen3.8-27B": "qwen3.8-27b",
    "Qwen/Qwen3.6-35B-A3B": "qwen3.6-35b-a3b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "mistralai/Ministral-3-8B-Base-2512": "ministral-3-8b",
    "zai-org/GLM-4.7-Flash": "glm-4.7-flash",
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
