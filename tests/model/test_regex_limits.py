"""A pattern that would not end is refused by its key, in a second; one that ends is let through."""

import pytest

from lorakit.errors import ModelError, RecipeError
from lorakit.model.lora_config import add_adapter
from lorakit.model.param_counts import count, count_trainable
from lorakit.model.regex_limits import check_patterns, check_settings
from lorakit.planning.known_models import shape_config
from lorakit.recipe.schema import Recipe

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.post_attention_layernorm")
ENDLESS = r"(([a-z]+)*[_.0-9]*)*!"


def recipe(**values):
    return Recipe(model="m", data="d", **values)


@pytest.mark.parametrize(
    ("key", "value"), [("target_modules", ENDLESS), ("rank_pattern", {"q_proj": 4, ENDLESS: 8})]
)
def test_a_pattern_that_would_not_end_is_named(key, value):
    with pytest.raises(RecipeError) as caught:
        check_patterns(recipe(**{key: value}), NAMES)
    assert f"{key}: {ENDLESS!r} did not finish on the model's 2 names" in caught.value.message
    assert "[q_proj, v_proj]" in caught.value.hint


@pytest.mark.parametrize("wrong", ["(q_proj", "*_proj", "(" * 9999, "a{9999999999999}"])
def test_what_is_no_pattern_is_said_in_one_line(wrong):
    with pytest.raises(RecipeError, match="is not a regular expression") as caught:
        check_patterns(recipe(target_modules=wrong), NAMES)
    assert caught.value.message.startswith("target_modules: ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_patterns_of_every_key_are_tried_and_plain_names_start_no_process(monkeypatch):
    good = recipe(target_modules=r".*\.(q|v)_proj", alpha_pattern={r"layers\.\d+\.q_proj": 8.0})
    check_patterns(good, NAMES)
    monkeypatch.setattr("lorakit.model.regex_limits._match_in_subprocess", None)
    check_patterns(recipe(target_modules=["(a+)+$"], modules_to_save=["lm_head"]), NAMES)
    with pytest.raises(TypeError):
        check_patterns(recipe(modules_to_save=["(a+)+"]), NAMES)


def test_plan_and_training_ask_before_they_match():
    with pytest.raises(RecipeError, match="target_modules"):
        count_trainable(recipe(target_modules="(q_proj"), count(shape_config("tiny")))
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(shape_config("tiny"))
    with pytest.raises(RecipeError, match="alpha_pattern"):
        add_adapter(base, recipe(target_modules=["q_proj"], alpha_pattern={"q_proj)": 2.0}))


def test_a_strangers_adapter_is_named_with_its_file():
    values = {"layers_pattern": "layers(", "rank_pattern": 7, "target_modules": ["a", 3]}
    with pytest.raises(ModelError, match=r"a/adapter_config.json: layers_pattern: "):
        check_settings(values, NAMES, "a/adapter_config.json: ", ModelError)
