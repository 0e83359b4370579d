"""Names and numbers of an adapter that match nothing are refused, with a suggestion."""

import pytest
from tests.families import tiny_config

from lorakit.errors import RecipeError
from lorakit.model.matching import check_adapter_settings
from lorakit.recipe.schema import Recipe

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def check(name="qwen3", **values):
    values = {"target_modules": LLAMA, **values}
    check_adapter_settings(Recipe(model="m", data="d", **values), tiny_config(name))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.0\..*_proj"},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"exclude_modules": ["gate_proj"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"layers_to_transform": [0, 1]},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.v_proj": 8}},
    ],
)
def test_what_matches_is_taken(values):
    check(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # One wrong name among right ones: peft would train the rest in silence.
        ({"target_modules": ["q_proj", "vproj"]}, r"target_modules: 'vproj' .*did you mean v_proj"),
        (
            {"target_modules": ["q_proj", "self_attn"]},
            "target_modules: 'self_attn' is a module",
        ),
        (
            {"target_modules": "q_prj"},
            "target_modules: the pattern 'q_prj' matches no",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is the head"),
        ({"modules_to_save": ["lm_heads"]}, r"modules_to_save: 'lm_heads' .*did you mean lm_head"),
        ({"exclude_modules": ["up_prj"]}, r"exclude_modules: 'up_prj' .*did you mean up_proj"),
        ({"layers_to_transform": [0, 99]}, r"layer 99 has no target, expected some of 0 to 1"),
        ({"rank_pattern": {"qproj": 4}}, r"rank_pattern: 'qproj' .*did you mean q_proj"),
        ({"alpha_pattern": {"layers.7.self_attn.q_proj": 4}}, "alpha_pattern: 'layers.7"),
        # A layer that exists and gets no adapter takes no rank either.
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, "rank_pattern: 'v_proj'"),
    ],
)
def test_what_matches_nothing_is_refused_by_name(values, message):
    with pytest.raises(RecipeError, match=message) as caught:
        check(**values)
    assert "layers of this model: " in caught.value.hint


def test_all_faults_come_in_one_error():
    with pytest.raises(RecipeError) as caught:
        check(target_modules=["qproj", "kproj"], exclude_modules=["nothing_like_it"])
    for name in ("'qproj'", "'kproj'", "'nothing_like_it'"):
        assert name in caught.value.message


@pytest.mark.parametrize(
    "targets",
    [
        ["gate_proj", "up_proj", "down_proj"],
        [f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")],
        r".*\.shared_experts\.(gate|up|down)_proj",
    ],
)
@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_shared_mlps_that_peft_turns_into_experts_are_refused(name, targets):
    """With lora_dropout: 0 PEFT would adapt every routed expert, and no module that was named."""
    with pytest.raises(RecipeError, match=r"PEFT adapts the routed experts \(down_proj, gate_up"):
        check(name, target_modules=targets, lora_dropout=0.0)
    with pytest.raises(RecipeError, match="ParamWrapper"):
        check(name, target_modules=targets, lora_dropout=0.1)
