"""Keys and defaults of `objective: grpo`, compared with TRL's."""

import dataclasses

from trl import GRPOConfig

from lorakit.recipe.grpo_keys import GRPO_DEFAULTS, GRPO_KEYS
from lorakit.recipe.schema import Recipe

OURS = {"reward_funcs", "max_prompt_length"}
RENAMED = {
    "importance_sampling_mode": "vllm_importance_sampling_mode",
    "importance_sampling_clip_max": "vllm_importance_sampling_clip_max",
}


def test_keys_have_the_names_and_defaults_of_trl():
    theirs = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    for key in set(GRPO_KEYS) - OURS:
        ours = Recipe.model_fields[key].get_default(call_default_factory=True)
        assert ours == theirs[RENAMED.get(key, key)], key


def test_a_recipe_has_them_only_with_the_objective():
    given = {"model": "m", "data": "d"}
    grpo = Recipe.model_validate({**given, "objective": "grpo", "reward_funcs": ["exact_answer"]})
    for key, value in GRPO_DEFAULTS.items():
        assert getattr(grpo, key) == value
        assert getattr(Recipe.model_validate(given), key) != value
    assert grpo.rows_per_step == 4
    assert grpo.held_out == 0
