"""What a layer keeps is what its level says, and the arena hands out each place once."""

import pytest
import torch

from lorakit.engine.attach import attach_engine
from lorakit.engine.decoder_layer import ActivationBuffers, SavedActivations

from .engine_models import tiny


@pytest.mark.parametrize(
    ("level", "kinds"),
    [
        (SavedActivations.ALL, {"out", "mid", "qkv", "gate_up"}),
        (SavedActivations.NO_GATE_UP, {"out", "mid", "qkv"}),
        (SavedActivations.MIDDLE, {"out", "mid"}),
        (SavedActivations.INPUT, {"out"}),
    ],
)
def test_the_arena_has_room_for_what_the_level_keeps(level, kinds):
    engine, _ = attach_engine(tiny().get_base_model(), torch.device("cpu"))
    engine.keep([level] * 3)
    arena = ActivationBuffers(engine.layers, 5, 64, torch.zeros(1))
    assert {name for name, _ in arena.places} == kinds
    assert len(arena.places) == 3 * len(kinds)
    place = arena.take("out", 1)
    assert place.shape == (5, 64)
    assert arena.take("out", 1) is None  # a recomputation takes memory of its own


def test_more_kept_means_less_recomputed_and_the_same_bits():
    model = tiny(lora_dropout=0.2)
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    tokens = torch.arange(2, 30).view(2, 14)
    found = []
    for level in SavedActivations:
        engine.keep([level] * 3)
        torch.manual_seed(5)
        model.zero_grad()
        engine({"input_ids": tokens}, None).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        for ours, first in zip(other, found[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize(
    "name", ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
)
def test_a_norm_that_trains_is_left_to_the_model(name):
    """The layer's backward has no gradient for it."""
    model = tiny("qwen3")
    layer = model.get_base_model().model.layers[1]
    layer.get_submodule(name).weight.requires_grad_(True)
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is None
    assert "norm weights train" in path
