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
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-4-e4b": 7_996_156_490,
    "gemma-4-26b-a4b": 25_805_936_206,
    "gemma-4-31b": 31_273_088_876,
    "qwen3.5-4b": 4_659_865_088,
    "qwen3.5-9b": 9_653_104_368,
    "qwen3.8-27b": 27_781_427_952,
    "qwen3.6-35b-a3b": 35_951_822_704,
    "gpt-oss-20b": 20_914_757_184,
    "ministral-3-8b": 8_918_026_716,
    "glm-4.7-flash": 31_221_488_576,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
}

# Elements of these files that no parameter is loaded from.
NOT_LOADED = {
    # Layers for multi-token prediction: one decoder layer, a projection from 2 D to D, norms.
    "qwen3.5-4b": 120_599_552,
    "qwen3.5-9b": 2 * 4096**2 + 4096 * (8192 + 2 * 1024 + 4096 + 3 * 12288) + 5 * 4096 + 512,
    "qwen3.8-27b": 424_699_392,
    "qwen3.6-35b-a3b": 844_640_768,
    "glm-4.7-flash": 1_278_097_600,  # it also repeats embedding and head
    # Buffers: a scale for each layer, mean and spread of images.
    "gemma-4-26b-a4b": 30 + 2 * 1152,
    "gemma-4-31b": 60 + 2 * 1152,
    # Keys and values of 18 layers that use those of others, and a scale for each of 42 layers.
    "gemma-4-e4b": 2560 * 2 * (15 * 512 + 3 * 1024) + 15 * 256 + 3 * 512 + 42,
    "ministral-3-8b": 2 * 7 * 34,  # the scales of fp8 weights
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    assert count(shape_config(name)).total + NOT_LOADED.get(name, 0) == PUBLISHED[name]


def test_every_shape_has_a_published_total_and_every_repository_a_shape():
    assert set(SHAPES) - {"tiny", "tiny-moe"} == set(PUBLISHED)
    assert set(REPOSITORIES.values()) <= set(SHAPES)


def test_unknown_shapes_are_listed():
    with pytest.raises(RecipeError, match="did you mean llama-2-7b") as caught:
        shape_config("llama2-7b")
    assert "qwen3-30b-a3b" in caught.value.hint
