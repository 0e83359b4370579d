"""Hand-written configs have the number of parameters that their publishers name."""

import pytest

from lorakit.errors import RecipeError
from lorakit.model.param_counts import count
from lorakit.planning.known_models import REPOSITORIES, SHAPES, shape_config

# Totals of the published safetensors files; a tied head is stored once.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    assert count(shape_config(name)).total == PUBLISHED[name]


def test_every_shape_has_a_published_total_and_every_repository_a_shape():
    assert set(SHAPES) - {"tiny"} == set(PUBLISHED)
    assert set(REPOSITORIES.values()) <= set(SHAPES)


def test_unknown_shapes_are_listed():
    with pytest.raises(RecipeError, match="did you mean llama-2-7b") as caught:
        shape_config("llama2-7b")
    assert "qwen3-30b-a3b" in caught.value.hint
