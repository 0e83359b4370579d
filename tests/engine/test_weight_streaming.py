"""Weights that travel: the entered layer computes, all others show their weights at home."""

import pytest
import torch

from lorakit.engine.decoder_layer import FastLayer
from lorakit.engine.weight_streaming import StreamedBase

from .engine_models import tiny

CPU = torch.device("cpu")


def layers_of(model):
    base = model.get_base_model()
    found = enumerate(base.model.layers)
    layers = [FastLayer(x, i, base.config, {}) for i, x in found]
    for layer in layers:
        for group in layer.groups:
            group.merge()
    return layers


def test_modules_point_at_the_gpu_while_entered_and_home_afterwards():
    model = tiny()
    layers = layers_of(model)
    weights = [x.self_attn.k_proj.base_layer.weight for x in model.get_base_model().model.layers]
    before = [w.clone() for w in weights]
    streamed = StreamedBase([layer.groups for layer in layers], CPU)
    home = [w.data_ptr() for w in weights]
    for number, following in ((0, 1), (1, 2), (2, None), (2, 1), (1, 0), (0, None)):
        streamed.load_layer(number, following)
        assert weights[number].data_ptr() != home[number]
        for w, old in zip(weights, before, strict=True):
            assert torch.equal(w, old)
    streamed.offload()
    assert [w.data_ptr() for w in weights] == home


def test_every_group_of_a_layer_travels():
    """Matrices of one layer lie side by side: each module finds its own, in every layer."""
    layers = layers_of(tiny(base_changes={"attention_bias": True}))
    weights = [[b.weight for g in layer.groups for b in g.bases] for layer in layers]
    before = [[w.clone() for w in own] for own in weights]
    streamed = StreamedBase([layer.groups for layer in layers], CPU)
    home = [[w.data_ptr() for w in own] for own in weights]
    for number in (0, 2, 1):
        streamed.load_layer(number)
        assert all(map(torch.equal, weights[number], before[number]))
        away = [w.data_ptr() for w in weights[number]]
        assert len({*away, *home[number]}) == 2 * len(away)
        for other in {0, 1, 2} - {number}:
            assert all(map(torch.equal, weights[other], before[other]))


def test_merged_matrices_and_their_modules_are_one_memory():
    layers = layers_of(tiny())
    streamed = StreamedBase([layer.groups for layer in layers], CPU)
    streamed.load_layer(1)
    group = layers[1].qkv
    for base, rows in zip(group.bases, group.columns, strict=True):
        assert base.weight.data_ptr() == group.merged[rows].data_ptr()


def test_four_bit_weights_travel_packed_with_their_scales():
    bnb = pytest.importorskip("bitsandbytes")
    from lorakit.model.random_init import random_model
    from lorakit.planning.known_models import shape_config
    from lorakit.types import Device

    device = Device("cpu", "x", 2**30, "float32")
    base = random_model(shape_config("tiny"), device, four_bit=True).requires_grad_(False)
    layers = [FastLayer(x, i, base.config, {}, CPU) for i, x in enumerate(base.model.layers)]
    before = [layer.gate_up.weight().clone() for layer in layers]
    streamed = StreamedBase([layer.groups for layer in layers], CPU)
    packed = streamed.host_buffers[0].bytes.numel()
    assert packed < sum(b.in_features * b.out_features for g in layers[0].groups for b in g.bases)
    for number in (0, 1, 0):
        streamed.load_layer(number)
        assert torch.equal(layers[number].gate_up.weight(), before[number])
    assert isinstance(base.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
