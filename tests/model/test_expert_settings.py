"""Faults of adapters on experts, each in one message before weights are loaded."""

import pytest
from tests.families import tiny_config

from lorakit.errors import RecipeError
from lorakit.model.expert_settings import expert_notes
from lorakit.model.lora_config import resolve_targets
from lorakit.model.matching import check_adapter_settings
from lorakit.recipe.loader import load_recipe


def check(name="qwen3_moe", **values):
    config = tiny_config(name)
    flags = {"model": "m", "data": "d", "expert_adapters": "all", **values}
    recipe = resolve_targets(load_recipe(None, [], flags), config).recipe
    check_adapter_settings(recipe, config)
    return recipe


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank_pattern": {r"experts\.200\.gate_proj": 4}}, "there are 8 experts"),
        ({"rank_pattern": {"experts.3.down_proj": 4}}, "name experts.down_proj or experts.gate_up"),
        ({"alpha_pattern": {"experts.w1": 4.0}}, "all experts of a tensor have one rank"),
        ({"use_dora": True}, "use_dora: not supported with expert_adapters: all"),
        ({"bias": "all"}, "PEFT trains no biases of raw tensors"),
        ({"lora": {"lora_bias": True}}, "PEFT gives raw tensors no lora_bias"),
        ({"layers_to_transform": [0]}, "PEFT adapts raw tensors of all layers"),
        ({"init_lora_weights": "olora"}, "olora needs the weight of a linear layer"),
        ({"name": "qwen3"}, "expert_adapters: all, but this model has no experts"),
        ({"name": "qwen3", "expert_adapters": "none"}, "none, but this model has no experts"),
        ({"name": "llama4"}, "no product by expert is known for"),
        (
            {"expert_adapters": "shared", "rank_pattern": {"experts.gate_up_proj": 4}},
            "experts get adapters with expert_adapters: all",
        ),
        (
            {"name": "deepseek_v3", "expert_adapters": "shared", "router_aux_loss_coef": 0.1},
            "no such loss in transformers",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_faults_are_named(values, said):
    with pytest.raises(RecipeError) as caught:
        check(**values)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rank_pattern": {r"experts\.gate_up_proj": 4}},
        {"method": "qlora", "lora_dropout": 0.2},
        {"name": "deepseek_v3"},
        {"router_aux_loss_coef": 0.001},
        {"modules_to_save": ["mlp.gate"]},
    ],
    ids=lambda values: ",".join(values) or "plain",
)
def test_what_is_supported_passes(values):
    check(**values)


@pytest.mark.parametrize(
    ("name", "none", "shared"),
    [
        ("qwen3_moe", ["q_proj"], []),
        ("qwen3_5_moe", ["q_proj", "in_proj_qkv"], ["gate_proj", "up_proj", "down_proj"]),
        ("granitemoehybrid", ["q_proj", "in_proj"], ["input_linear", "output_linear"]),
        ("gemma4_moe", ["q_proj"], ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_the_choices_of_layers_that_every_token_passes(name, none, shared):
    few = str(check(name, expert_adapters="none").target_modules)
    more = str(check(name, expert_adapters="shared").target_modules)
    assert all(leaf in few and leaf in more for leaf in none)
    assert not any(leaf in few for leaf in shared)
    assert all(leaf in more for leaf in shared)


def test_what_engines_read_is_said_before_training():
    config = tiny_config("qwen3_moe")
    assert list(expert_notes(check(expert_adapters="shared"), config)) == []
    (note,) = expert_notes(check(), config)
    assert "vLLM" in note
    assert "merged model" in note
    config = tiny_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    (note,) = expert_notes(check("gpt_oss", expert_adapters="shared", method="qlora"), config)
    assert note == "stored as MXFP4, dequantized once while loading and kept as NF4"
