"""Adapters are float32, reach the right layers, and name the layers that exist."""

import pytest
import torch

from lorakit.errors import RecipeError
from lorakit.hardware import detect_device
from lorakit.model.load import load_base, load_config
from lorakit.model.lora_config import add_adapter, count_parameters, resolve_targets
from lorakit.recipe.loader import load_recipe


def resolved(folder, **values):
    return load_recipe(None, [], {"model": str(folder), "data": "d", **values})


def tuned(folder, dtype="bfloat16", **values):
    r = resolved(folder, **values)
    r = resolve_targets(r, load_config(r.recipe, str(folder)))
    base = load_base(r.recipe, str(folder), detect_device(dtype, prefer="cpu"))
    return add_adapter(base, r.recipe)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_float32_on_a_16_or_4_bit_base(tiny_model_dir, method):
    model = tuned(tiny_model_dir, method=method)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("lora_" in n for n in trained)
    assert all(not p.any() for n, p in trained.items() if "lora_B" in n)


def adapter_of(model):
    """What the adapter is: its tensors, scales and dropout."""
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {
        "tensors": {n: (p.shape, float(p.detach().norm())) for n, p in trained},
        "scales": {n: m.scaling["default"] for n, m in layers},
        "dropout": {n: getattr(m.lora_dropout["default"], "p", 0.0) for n, m in layers},
    }


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"lora_r": 2}, {"tensors", "scales"}),
        ({"lora_alpha": 3}, {"scales"}),
        ({"lora_dropout": 0.5}, {"dropout"}),
        ({"use_rslora": True}, {"scales"}),
        ({"use_dora": True}, {"tensors"}),
        ({"init_lora_weights": "gaussian"}, {"tensors"}),
        ({"modules_to_save": ["lm_head"]}, {"tensors"}),
        ({"exclude_modules": ["k_proj"]}, {"tensors", "scales", "dropout"}),
        ({"layers_to_transform": [1]}, {"tensors", "scales", "dropout"}),
        ({"rank_pattern": {"k_proj": 2}}, {"tensors", "scales"}),
        ({"alpha_pattern": {"k_proj": 3}}, {"scales"}),
        ({"target_modules": ["q_proj"]}, {"tensors", "scales", "dropout"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_each_key_of_the_adapter_reaches_the_model(tiny_model_dir, values, parts):
    found = []
    for given in ({}, values):
        torch.manual_seed(0)
        found.append(adapter_of(tuned(tiny_model_dir, **{"lora_r": 4, **given})))
    assert {part for part in found[0] if found[0][part] != found[1][part]} == parts


def test_modules_that_train_as_a_whole_are_float32_too(tiny_model_dir):
    model = tuned(tiny_model_dir, modules_to_save=["lm_head"])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_targets_auto_is_resolved_once_and_kept_otherwise(tiny_model_dir):
    config = load_config(resolved(tiny_model_dir).recipe, str(tiny_model_dir))
    auto = resolve_targets(resolved(tiny_model_dir), config)
    assert len(auto.recipe.target_modules) == 7
    assert auto.origins["target_modules"] == "derived: model family llama"
    own = resolved(tiny_model_dir, target_modules=["q_proj"])
    assert resolve_targets(own, config) is own


def test_what_peft_refuses_is_one_error_without_a_hint_about_names(tiny_model_dir):
    with pytest.raises(RecipeError, match=r"the adapter cannot be attached: .*query") as caught:
        tuned(tiny_model_dir, target_modules=["query"])
    assert caught.value.hint is None


def test_saved_config_names_no_path_of_this_machine(tiny_model_dir):
    config = tuned(tiny_model_dir).peft_config["default"]
    assert config.base_model_name_or_path == tiny_model_dir.name


def test_parameter_counts_see_through_four_bit_storage(tiny_model_dir):
    lora, qlora = tuned(tiny_model_dir, lora_r=4), tuned(tiny_model_dir, method="qlora", lora_r=4)
    assert count_parameters(lora) == count_parameters(qlora)
