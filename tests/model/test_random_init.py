"""Random models have the named shape, in 16 or 4 bits, and run."""

import pytest
import torch
from tests.families import tiny_config

from lorakit.errors import RecipeError
from lorakit.hardware import detect_device
from lorakit.model.random_init import random_model
from lorakit.planning.known_models import shape_config


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_random_model_has_all_its_layers_and_runs(four_bit):
    config = shape_config("tiny")
    model = random_model(config, detect_device("bfloat16", prefer="cpu"), four_bit)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == ({"Linear4bit"} if four_bit else {"Linear"})
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 512)
    assert torch.isfinite(logits).all()
    assert {layer.self_attn.layer_idx for layer in model.model.layers} == {0, 1}


@pytest.mark.parametrize("name", ["qwen3_5", "gpt_oss", "nemotron_h", "lfm2"])
def test_layers_of_other_families_are_made_one_at_a_time(name):
    config = tiny_config(name).get_text_config()
    model = random_model(config, detect_device("float32", prefer="cpu"), four_bit=False)
    assert model(torch.arange(8).unsqueeze(0)).logits.isfinite().all()


def test_layers_that_share_keys_are_refused():
    config = tiny_config("gemma4").get_text_config()
    with pytest.raises(RecipeError, match="gemma4_text cannot be made one at a time"):
        random_model(config, detect_device("float32", prefer="cpu"), four_bit=False)
