"""A scheme of `init_lora_weights` works, or is refused before weights are loaded."""

import pytest
import torch
from tests.families import tiny_config

from lorakit.errors import RecipeError
from lorakit.model.adapter_init import SUPPORTED, UNSUPPORTED
from lorakit.model.lora_config import add_adapter
from lorakit.model.matching import check_adapter_settings
from lorakit.recipe.schema import Recipe


def recipe(scheme, **values):
    values = {"target_modules": ["q_proj", "v_proj"], "lora_r": 4, **values}
    return Recipe(model="m", data="d", init_lora_weights=scheme, **values)


@pytest.mark.parametrize("scheme", [True, False, *SUPPORTED])
def test_a_supported_scheme_is_taken_and_initializes(scheme):
    from transformers import AutoModelForCausalLM

    config, asked = tiny_config("qwen3"), recipe(scheme)
    check_adapter_settings(asked, config)
    torch.manual_seed(0)
    model = add_adapter(AutoModelForCausalLM.from_config(config), asked)
    products = [
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for layer in model.modules()
        if getattr(layer, "lora_A", None)
    ]
    assert products
    starts_at_zero = scheme in (True, "gaussian", "orthogonal", "eva")
    # The orthogonal scheme makes the product zero up to rounding.
    assert all((float(p.detach().abs().max()) < 1e-6) == starts_at_zero for p in products)


@pytest.mark.parametrize("scheme", sorted(UNSUPPORTED))
def test_schemes_that_need_a_second_call_are_refused(scheme):
    with pytest.raises(RecipeError, match=f"^init_lora_weights: {scheme} ") as caught:
        check_adapter_settings(recipe(scheme), tiny_config("qwen3"))
    assert "layers of this model" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": "pisa"}, "pisa: unknown, .*; did you mean pissa"),
        ({"scheme": "PISSA"}, "PISSA: unknown"),
        ({"scheme": "pissa_niter_x"}, "unknown, .*; did you mean pissa_niter_16"),
        ({"scheme": "pissa_niter_0"}, "unknown"),
        ({"scheme": ""}, "unknown"),
        ({"scheme": "pissa", "method": "qlora"}, "method: qlora does not keep"),
        ({"scheme": "orthogonal", "lora_r": 5}, "even rank, but lora_r of .*q_proj is 5"),
        ({"scheme": "orthogonal", "rank_pattern": {"v_proj": 3}}, "v_proj is 3"),
        ({"scheme": "pissa", "lora_r": 512}, "smaller side of a layer"),
        ({"scheme": "olora", "rank_pattern": {"v_proj": 512}}, r"v_proj \[\d+, \d+\] is 512"),
        (
            {"scheme": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
            "no effect on model.embed_tokens",
        ),
    ],
)
def test_unusable_schemes_are_refused_with_the_reason(values, message):
    with pytest.raises(RecipeError, match=message):
        check_adapter_settings(recipe(**values), tiny_config("qwen3"))


def test_a_wrong_name_and_a_wrong_scheme_come_in_one_error():
    with pytest.raises(RecipeError, match=r"(?s)qproj.*init_lora_weights: corda"):
        check_adapter_settings(recipe("corda", target_modules=["qproj"]), tiny_config("qwen3"))
