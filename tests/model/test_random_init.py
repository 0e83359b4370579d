"""Random models have the named shape, in 16 or 4 bits, and run."""

import pytest
import torch
from tests.families import FAMILIES, MORE, declared_class, tiny_config

from lorakit.hardware import detect_device
from lorakit.model.base_class import empty_base
from lorakit.model.param_counts import count
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


@pytest.mark.parametrize(
    ("name", "four_bit"),
    [*((name, True) for name in (*FAMILIES, *MORE)), ("gemma4", False), ("nemotron_h", False)],
)
def test_every_family_is_built_layer_by_layer_as_the_loader_builds_it(name, four_bit):
    config = tiny_config(name)
    config.architectures = [declared_class(config).__name__]
    model = random_model(config, detect_device("float32", prefer="cpu"), four_bit)
    assert model(torch.arange(8).unsqueeze(0)).logits.isfinite().all()
    empty = empty_base(config)
    assert type(model) is type(empty)
    quantized = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert quantized == ({n for n, _, _ in count(config).linear} if four_bit else set())
    if not four_bit:
        shapes = {n: p.shape for n, p in empty.named_parameters()}
        assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cpu"}
