"""Quantized bases train if the method can use them; all others are refused with a way out."""

from types import SimpleNamespace

import pytest

from lorakit.errors import ModelError
from lorakit.model.stored_quantization import (
    dequantizing,
    require_trainable_weights,
    stored_quantization,
)
from lorakit.recipe.loader import load_recipe

FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}
EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def config_of(values):
    return SimpleNamespace(quantization_config=values)


def recipe_of(method):
    return load_recipe(None, [], {"model": "m", "data": "d.jsonl", "method": method}).recipe


@pytest.mark.parametrize(
    ("values", "method"),
    [
        (None, "lora"),
        (None, "qlora"),
        (FOUR_BIT, "qlora"),
        ({"quant_method": "mxfp4"}, "lora"),
        ({"quant_method": "mxfp4"}, "qlora"),
    ],
)
def test_what_the_method_can_train_on_passes(values, method):
    require_trainable_weights(recipe_of(method), config_of(values))


@pytest.mark.parametrize(
    ("values", "method", "way_out"),
    [
        (FOUR_BIT, "lora", "set method: qlora"),
        *(
            (values, method, "name the 16-bit original")
            for values in (
                EIGHT_BIT,
                {"quant_method": "gptq", "bits": 4},
                {"quant_method": "awq"},
                {"quant_method": "fp8"},
                {"quant_method": "compressed-tensors"},
            )
            for method in ("lora", "qlora")
        ),
    ],
)
def test_other_weights_are_refused_with_a_way_out(values, method, way_out):
    with pytest.raises(ModelError, match="its weights are already quantized") as caught:
        require_trainable_weights(recipe_of(method), config_of(values))
    assert values["quant_method"] in caught.value.message
    assert way_out in caught.value.hint


def test_only_mxfp4_is_dequantized_while_loading():
    assert stored_quantization(SimpleNamespace()) == {}
    assert dequantizing(config_of(FOUR_BIT)) == {}
    arguments = dequantizing(config_of({"quant_method": "mxfp4"}))
    assert arguments["quantization_config"].dequantize
