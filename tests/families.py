"""Tiny configs laid out as the hub has them, of families whose layers are not Llama's."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

TINY = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Qwen3.5 and Qwen3-Next: three layers of gated delta rule to one of softmax attention.
DELTA = {
    "num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
MIXED = {"num_hidden_layers": 4, "sliding_window": 32,
         "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 32}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "patch_size": 4}
GEMMA4 = {**TINY, **MIXED, "global_head_dim": 32}
FAMILIES = {
    "qwen3": {},
    "gemma2": MIXED,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "qwen3_5": {
        "text_config": {**TINY, **DELTA},
        "vision_config": {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64,
                          "num_position_embeddings": 16},
    },
    "qwen3_5_moe": {
        "text_config": {**TINY, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
        "vision_config": {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64,
                          "num_position_embeddings": 16},
    },
    "granitemoehybrid": {
        **MAMBA, "num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "mamba_d_head": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64, "intermediate_size": 32,
    },
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"],
             "block_multiple_of": 32},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_d_head": 16},
    # E2B's kind: inputs and widths of each layer, the last ones without keys of their own.
    "gemma3n_text": {
        **MIXED, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16,
        "laurel_rank": 8, "num_kv_shared_layers": 2, "altup_num_inputs": 2,
        "intermediate_size": [128, 128, 192, 192], "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {
        "text_config": {**GEMMA4, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 2,
                        "hidden_size_per_layer_input": 16},
        "vision_config": {**VISION, "num_hidden_layers": 2, "num_key_value_heads": 2,
                          "head_dim": 16, "position_embedding_size": 64},
        "audio_config": None,
    },
    "gemma4_moe": {
        "text_config": {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
                        "num_global_key_value_heads": 1, "enable_moe_block": True,
                        "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
        "vision_config": None,
        "audio_config": None,
    },
}  # fmt: skip

ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **ROUTED,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
QWEN_VISION = {
    **VISION,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
SIGLIP = {**VISION, "num_hidden_layers": 2, "image_size": 16, "vision_use_head": False}
PIXTRAL = {
    **VISION,
    "model_type": "pixtral",
    "num_hidden_layers": 2,
    "image_size": 16,
    "head_dim": 16,
}
# Families with Llama's shapes, and wrappers around text models as the hub has them.
MORE = {
    "llama": {}, "mistral": {}, "ministral3": {}, "qwen2": {}, "gemma": {}, "granite": {},
    "cohere2": {}, "smollm3": {}, "olmo3": {}, "exaone4": {}, "glm4": {}, "phi3": {},
    "seed_oss": {}, "hunyuan_v1_dense": {}, "starcoder2": {},
    "gemma3_text": MIXED,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1},
    "glm4_moe_lite": LATENT,
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "nemotron_h": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mamba"],
        "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
        "chunk_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    },
    "qwen3_vl": {"text_config": {**TINY, "rope_parameters": MROPE}, "tie_word_embeddings": True,
                 "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]}},
    "gemma3": {"text_config": {**TINY, **MIXED}, "vision_config": SIGLIP,
               "mm_tokens_per_image": 4},
    "mistral3": {"text_config": {**TINY, "model_type": "ministral3"}, "vision_config": PIXTRAL,
                 "image_token_index": 10, "tie_word_embeddings": False},
    "mistral3_small": {"text_config": {**TINY, "model_type": "mistral"}, "vision_config": PIXTRAL,
                       "image_token_index": 10, "tie_word_embeddings": False},
    "llama4": {
        "text_config": {**TINY, "num_hidden_layers": 4, "intermediate_size": 32,
                        "intermediate_size_mlp": 128, "num_local_experts": 4,
                        "attention_chunk_size": 64},
        "vision_config": {**SIGLIP, "vision_output_dim": 32, "projector_input_dim": 32,
                          "projector_output_dim": 32},
    },
    "muse_glimmer": {
        "text_config": {**TINY, "num_hidden_layers": 4, "sliding_window": 32},
        "vision_config": {**VISION, "num_hidden_layers": 2, "pos_emb_height": 4, "pos_emb_width": 4,
                          "max_position_embeddings": 16},
        "out_hidden_size": 128, "projector_hidden_size": 64,
    },
    "mistral4": {"text_config": {**TINY, **LATENT, "model_type": "mistral4"},
                 "vision_config": PIXTRAL, "image_token_index": 10, "tie_word_embeddings": False},
    "glm5_next": {
        "text_config": {**TINY, **LATENT, "layer_types": ["linear_attention", "full_attention"],
                        "mlp_layer_types": ["dense", "sparse"], "head_dim": 0,
                        "qk_rope_head_dim": 0, "index_head_dim": 16, "index_n_heads": 2,
                        "linear_head_dim": 16, "linear_num_heads": 4,
                        "hc_mult": 2, "hc_sinkhorn_iters": 2},
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
                          "image_size": 16, "projection_intermediate_size": 64},
    },
    # E2B's kind with its audio tower, which has no sdpa in transformers 5.23.
    "gemma4_audio": {
        **FAMILIES["gemma4"],
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "output_proj_dims": 32, "subsampling_conv_channels": [8, 8]},
    },
}  # fmt: skip
# Models on the hub, by row.
HUB = {
    "qwen3_5": "Qwen3.5, Qwen3.6, Qwen3.8", "qwen3_5_moe": "Qwen3.6-35B-A3B",
    "qwen3_moe": "Qwen3-30B-A3B", "qwen3_next": "Qwen3-Next-80B-A3B", "qwen3_vl": "Qwen3-VL",
    "gemma3": "Gemma 3 4B to 27B", "gemma3_text": "Gemma 3 1B", "gemma4_audio": "Gemma 4 E2B, E4B",
    "gemma4": "Gemma 4 without its audio tower", "gemma4_moe": "Gemma 4 26B-A4B",
    "gemma3n_text": "Gemma 3n, text model", "mistral3": "Ministral 3",
    "mistral3_small": "Mistral Small 3", "ministral3": "Ministral 3, text model",
    "llama4": "Llama 4 Scout", "gpt_oss": "gpt-oss-20b in bfloat16", "glm4_moe": "GLM-4.5, GLM-4.6",
    "glm4_moe_lite": "GLM-4.7-Flash", "deepseek_v3": "DeepSeek-V3", "granite": "Granite 3",
    "granitemoehybrid": "Granite 4.0-H", "nemotron_h": "Nemotron 3 Nano", "lfm2": "LFM2",
    "falcon_h1": "Falcon-H1", "muse_glimmer": "Muse Glimmer", "cohere2": "Command R7B",
    "seed_oss": "Seed-OSS-36B", "llama": "Llama 2, 3", "mistral": "Mistral 7B, Nemo",
    "qwen2": "Qwen2.5", "qwen3": "Qwen3", "phi3": "Phi-3.5", "olmo3": "OLMo 3", "glm4": "GLM-4",
    "exaone4": "EXAONE 4.0", "smollm3": "SmolLM3", "hunyuan_v1_dense": "Hunyuan",
    "starcoder2": "StarCoder2", "gemma": "Gemma", "gemma2": "Gemma 2",
    "qwen3_5_text": "Qwen3.5, text model", "glm5_next": "GLM-5.3-Flash",
    "mistral4": "Mistral Small 4",
}  # fmt: skip
# Rows that are another form of the model type.
FORMS = {
    "gemma4_moe": "gemma4",
    "gemma4_audio": "gemma4",
    "mistral3_small": "mistral3",
    "mistral4": "mistral3",
}


def declared_class(config):
    """The class that config.json names on the hub for this model type."""
    auto = AutoModelForMultimodalLM if hasattr(config, "text_config") else AutoModelForCausalLM
    return auto._model_mapping[type(config)]


def tiny_config(name, **changes):
    """The config of this family with `changes` to its text model."""
    kind, values = FORMS.get(name, name), {**FAMILIES, **MORE}[name]
    if "text_config" in values:
        values = {**values, "text_config": {**values["text_config"], **changes}}
        return AutoConfig.for_model(kind, **values)
    return AutoConfig.for_model(kind, **{**TINY, **values, **changes})
