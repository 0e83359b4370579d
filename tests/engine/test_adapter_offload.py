"""Adapters at home on the host: values come by turns, gradients return, copies are shared."""

import torch

from lorakit.engine.adapter_offload import HostAdapters
from lorakit.engine.decoder_layer import FastLayer
from lorakit.engine.lora_linear import point_sinks

from .engine_models import tiny

CPU = torch.device("cpu")


def made(**lora):
    model = tiny(**lora)
    base = model.get_base_model()
    layers = [FastLayer(x, i, base.config, {}) for i, x in enumerate(base.model.layers)]
    return layers, HostAdapters([layer.groups for layer in layers], CPU)


def test_values_survive_and_come_to_the_layer_that_is_entered():
    _, adapters = made()
    values = [[p.clone() for p in own] for own in adapters.parameters]
    for number in (0, 1, 2, 1, 0):
        adapters.load_layer(number, following=(number + 1) % 3)
        for parameters, before in zip(adapters.parameters, values, strict=True):
            for parameter, value in zip(parameters, before, strict=True):
                assert torch.equal(parameter, value)
    adapters.point_to_host()
    with torch.no_grad():
        adapters.parameters[1][0].fill_(7.0)  # the optimizer writes at home
    adapters.load_layer(1)
    assert bool((adapters.parameters[1][0] == 7.0).all())


def test_values_that_were_loaded_over_them_reach_every_layer():
    """A checkpoint puts tensors of its own in; a layer's copy may be at work meanwhile."""
    _, adapters = made()
    for number in (0, 1, 2):
        adapters.load_layer(number, following=(number + 1) % 3)
    adapters.load_layer(0)
    for parameter in (p for own in adapters.parameters for p in own):
        parameter.data = torch.full_like(parameter, 7.0)
    adapters.adopt()
    for number in (0, 1, 2):
        adapters.load_layer(number, following=(number + 1) % 3)
        assert all(bool((p == 7.0).all()) for p in adapters.parameters[number])


def test_layers_with_other_modules_have_room_and_copies_of_their_own():
    layers, adapters = made(
        target_modules=r".*layers\.0\..*[qkv]_proj|.*layers\.[12]\..*q_proj|.*layers\.2\..*up_proj"
    )
    counts = [[len(group.adapted) for group in layer.groups] for layer in layers]
    assert counts == [[3, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]]
    for layer in layers:
        for group in layer.groups:
            assert group.a.shape[0] == group.rank * len(group.adapted)
    for number, layer in enumerate(layers):
        flat = adapters.gradients(number)
        assert flat.numel() == sum(p.numel() for group in layer.groups for p in group.parameters)
        point_sinks(layer.groups, flat)
        flat.fill_(number + 1)
        adapters.copy_grads_to_host(number)
    adapters.finish()
    for number, own in enumerate(adapters.parameters):
        assert all(bool((p.grad == number + 1).all()) for p in own)


def test_gradients_go_home_layer_by_layer_and_start_at_zero():
    layers, adapters = made()
    for step in (1.0, 2.0):
        for number in (2, 1, 0):
            point_sinks(layers[number].groups, adapters.gradients(number))
            for group in layers[number].groups:
                group.a_grad_buffer += step * (number + 1)
                group.b_grad_buffer -= step * (number + 1)
            adapters.copy_grads_to_host(number)
        adapters.finish()
        for number, layer in enumerate(layers):
            for group in layer.groups:
                for own in group.adapted:
                    assert bool((own.a.grad == step * (number + 1)).all())
                    assert bool((own.b.grad == -step * (number + 1)).all())


def test_layers_share_one_copy_in_the_bases_type():
    layers, _ = made()
    assert layers[0].qkv.a.data_ptr() == layers[2].qkv.a.data_ptr()
    assert layers[0].qkv.a.data_ptr() != layers[0].down.a.data_ptr()


def test_they_leave_with_values_of_their_own():
    _, adapters = made()
    before = adapters.parameters[0][0].clone()
    adapters.leave()
    assert torch.equal(adapters.parameters[0][0], before)
    assert adapters.parameters[0][0].grad is None
