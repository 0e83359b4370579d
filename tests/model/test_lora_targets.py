"""Targets come from the family and lie in the text decoder; unknown families say so."""

import pytest
from tests.families import FAMILIES, MORE, declared_class, tiny_config
from transformers import AutoConfig

from lorakit.errors import RecipeError
from lorakit.model import lora_targets as module
from lorakit.model.lora_config import resolve_targets
from lorakit.model.lora_targets import all_linear, lora_targets
from lorakit.model.matching import check_adapter_settings
from lorakit.model.param_counts import count, lora_target_layers
from lorakit.recipe.loader import load_recipe

LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def declaring(name):
    """The family's config with the class that the hub's config.json names."""
    config = tiny_config(name)
    config.architectures = [declared_class(config).__name__]
    return config


def resolved(config, targets):
    flags = {"model": "m", "data": "d.jsonl", "target_modules": targets}
    return resolve_targets(load_recipe(None, [], flags), config)


def chosen(recipe, config):
    return {name for name, _, _ in lora_target_layers(recipe, count(config))}


def test_llama_gets_its_seven_linear_layers():
    assert lora_targets(tiny_config("llama")) == (LLAMA_LIKE, "model family llama")


def test_a_family_without_a_row_gets_all_linear_layers_and_says_so(monkeypatch):
    monkeypatch.delitem(module.FAMILIES, "llama")
    targets, reason = lora_targets(tiny_config("llama"))
    assert targets == "all-linear"
    assert reason == "model family llama is not in the table: all linear layers"


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_a_family_without_a_row_gets_no_tower_router_or_expert(name, monkeypatch):
    config = declaring(name)
    monkeypatch.delitem(module.FAMILIES, config.get_text_config().model_type)
    auto = resolved(config, "auto").recipe
    assert auto.target_modules == resolved(config, "all-linear").recipe.target_modules
    check_adapter_settings(auto, config)
    names = chosen(auto, config)
    decoder = count(config).decoder
    assert all(n.startswith(f"{decoder}.") for n in names)
    assert not any("router" in n or ".experts" in n or "mamba.out_proj" in n for n in names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3_moe", "experts and router get none"),
        ("qwen3_next", "nor do dense and shared MLPs, by whose names PEFT adapts the experts"),
        ("falcon_h1", "Mamba's out_proj gets none"),
        ("gemma4_moe", "experts and router get none"),
    ],
)
def test_what_gets_no_adapter_is_said_in_one_line(name, said):
    assert said in lora_targets(declaring(name))[1]


def test_the_note_on_experts_is_left_out_for_a_model_without_any():
    assert lora_targets(declaring("gemma4"))[1] == "model family gemma4_text"


def test_names_that_a_tower_has_too_become_a_pattern_of_the_decoder():
    config = declaring("gemma3")
    mine = resolved(config, ["q_proj", "o_proj"])
    assert mine.recipe.target_modules == r"model\.language_model\.(?:.*\.)?(?:q_proj|o_proj)"
    assert mine.origins["target_modules"] == "derived: q_proj, o_proj of the text decoder"
    assert len(chosen(mine.recipe, config)) == 8


def test_a_list_stays_as_it_is_without_towers_of_these_names():
    assert resolved(declaring("qwen3_5"), ["q_proj"]).recipe.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "vproj"], "target_modules: 'vproj' matches no layer"),
        (r".*\.q_proj", r"vision_tower.* is outside the text decoder \(model.language_model\)"),
        (["fc1"], r"fc1 is outside the text decoder"),
    ],
)
def test_layers_outside_the_decoder_and_misspelled_ones_are_refused(targets, message):
    config = declaring("gemma3")
    with pytest.raises(RecipeError, match=message):
        check_adapter_settings(resolved(config, targets).recipe, config)


@pytest.mark.parametrize(
    ("name", "targets", "hint"),
    [
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"], None),
        ("glm4_moe", ["gate_proj", "up_proj", "down_proj"], "only with lora_dropout: 0"),
        ("falcon_h1", ["q_proj", "out_proj"], "target_modules: auto leaves this layer out"),
    ],
)
def test_layers_that_peft_refuses_lead_to_a_way_out(name, targets, hint):
    config = tiny_config(name)
    with pytest.raises(RecipeError) as caught:
        check_adapter_settings(resolved(config, targets).recipe, config)
    assert hint is None or hint in caught.value.hint


def test_all_linear_of_a_plain_model_stays_a_word():
    assert all_linear(tiny_config("qwen3"))[0] == "all-linear"
    assert (
        all_linear(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2))[0] == "all-linear"
    )
