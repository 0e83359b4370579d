"""Names of other tools mean the key of the recipe, with its origin; two values are a fault."""

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.loader import load_recipe

GIVEN = {"model": "demo", "data": "x"}


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"lr": 3e-5}, "learning_rate", 3e-5),
        ({"lora_rank": 4}, "lora_r", 4),
        ({"num_train_epochs": 2.0}, "epochs", 2.0),
        ({"per_device_train_batch_size": 2}, "micro_batch_size", 2),
        ({"max_seq_length": 512}, "cutoff_len", 512),
        ({"lr_scheduler_type": "inverse_sqrt"}, "lr_scheduler", "inverse_sqrt"),
        ({"optim": "adamw_torch"}, "optimizer", "adamw"),
        ({"optim": "lion_32bit"}, "optimizer", "lion_32bit"),
        ({"load_in_4bit": True}, "method", "qlora"),
        ({"load_in_4bit": False}, "method", "lora"),
        ({"adapter": "qlora"}, "method", "qlora"),
        ({"bf16": True}, "dtype", "bfloat16"),
        ({"train_on_inputs": False}, "train_on", "responses"),
        ({"lora": {"r": 4}}, "lora_r", 4),
        ({"lora": {"lora_dropout": 0.0}}, "lora_dropout", 0.0),
        ({"training_args": {"optim": "adamw_bnb_8bit"}}, "optimizer", "adamw_8bit"),
        ({"training_args": {"max_steps": -1}}, "max_steps", None),
        ({"training_args": {"warmup_steps": 0.1}}, "warmup_ratio", 0.1),
        ({"training_args": {"warmup_steps": 7}}, "warmup_steps", 7),
        ({"training_args": {"fp16": True}}, "dtype", "float16"),
    ],
)
def test_a_name_of_another_tool_sets_our_key(given, key, value):
    resolved = load_recipe({**GIVEN, **given})
    assert getattr(resolved.recipe, key) == value
    (name,) = given
    field = "".join(given[name]) if isinstance(given[name], dict) else None
    assert resolved.origins[key] == f"argument ({name}.{field})" if field else f"argument ({name})"
    assert (resolved.recipe.lora, resolved.recipe.training_args) == ({}, {})
    assert load_recipe(GIVEN, [f"{key}={'null' if value is None else value}"]).recipe == (
        load_recipe({**GIVEN, key: value}).recipe
    )


def test_the_rest_of_a_group_stays_and_the_method_gives_its_defaults():
    recipe = load_recipe(
        {**GIVEN, "load_in_4bit": True, "lora": {"lora_bias": True, "r": 8}}
    ).recipe
    assert (recipe.lora, recipe.lora_r, recipe.lora_alpha) == ({"lora_bias": True}, 8, 16)


def test_a_later_layer_replaces_a_value_under_any_name(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: demo\ndata: x\nlr: 1e-5\nlora:\n  r: 4\n  lora_bias: true\n")
    resolved = load_recipe(path, ["learning_rate=2e-5", "lora.r=8"])
    assert (resolved.recipe.learning_rate, resolved.recipe.lora_r) == (2e-5, 8)
    assert resolved.recipe.lora == {"lora_bias": True}
    assert load_recipe(path).origins["learning_rate"] == "r.yaml:3 (lr)"
    assert load_recipe(path).origins["lora_r"] == "r.yaml:4 (lora.r)"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"lr": 1e-5, "learning_rate": 2e-5}, "lr: sets learning_rate, which is 2e-05 too"),
        ({"lora": {"r": 4}, "lora_r": 8}, "r: sets lora_r, which is 8 too; keep one"),
        ({"bf16": False}, "bf16: means dtype, expected true (found: false)"),
        ({"bf16": 1}, "bf16: means dtype, expected true (found: 1)"),
        ({"adapter": "ia3"}, 'adapter: means method, expected "lora" or "qlora" (found: "ia3")'),
        ({"lr": 3.0}, "learning_rate: input should be less than 1 (found: 3.0)"),
        ({"lora": [1]}, "lora: input should be a valid dictionary"),
    ],
)
def test_two_values_or_one_without_counterpart_are_faults(given, fault):
    with pytest.raises(RecipeError) as caught:
        load_recipe({**GIVEN, **given})
    assert fault in caught.value.message
    assert "1 fault\n" in caught.value.message


def test_an_object_and_a_recipe_may_not_differ():
    objects = {"training_args": {"learning_rate": 1e-5, "seed": 3}}
    assert load_recipe(GIVEN, objects=objects, seed=3).recipe.learning_rate == 1e-5
    with pytest.raises(RecipeError) as caught:
        load_recipe(GIVEN, objects=objects, learning_rate=2e-5)
    assert (
        "learning_rate: 2e-05 (argument), and argument training_args is 1e-05; keep one"
        in caught.value.message
    )
