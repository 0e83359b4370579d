"""Keys of a recipe that only `objective: grpo` reads, and its defaults of other keys."""

from __future__ import annotations

from typing import Any

GRPO_KEYS = (
    "reward_funcs",
    "num_generations",
    "max_completion_length",
    "max_prompt_length",
    "temperature",
    "top_p",
    "top_k",
    "loss_type",
    "epsilon",
    "epsilon_high",
    "scale_rewards",
    "num_iterations",
    "mask_truncated_completions",
    "use_bias_correction_kl",
    "importance_sampling_mode",
    "importance_sampling_clip_max",
)
# Defaults that differ from those of the method. Dropout would make the trainer's probabilities
# others than the sampler's; TRL's rate for all weights is 1e-6, and adapters take more.
GRPO_DEFAULTS: dict[str, Any] = {
    "lora_dropout": 0.0,
    "learning_rate": 2e-5,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 4,
}
