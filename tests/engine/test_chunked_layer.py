"""One layer without autograd against autograd; chunks and their dropout masks are of one whole."""

import pytest
import torch

from lorakit.engine.attach import attach_engine
from lorakit.engine.chunked_layer import ChunkSize, LayerTask, backward, forward
from lorakit.engine.decoder_layer import Weights
from lorakit.engine.lora_linear import in_flat_order, point_sinks, refresh
from lorakit.ops.dropout_mask import keep_mask

from .engine_models import tiny

CPU = torch.device("cpu")


def start(batch=1, **lora):
    model = tiny(**lora)
    engine, _ = attach_engine(model.get_base_model(), CPU)
    refresh(engine.groups, training=True)
    torch.manual_seed(3)
    ids = torch.arange(2, 2 + 30).view(batch, -1)
    hidden, call = engine.embed_and_context({"input_ids": ids}, None)
    return engine, hidden.detach(), call


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cut", [ChunkSize(7, 1), ChunkSize(30, 2), ChunkSize(4096, 1)])
def test_output_and_gradients_are_those_of_the_layer_under_autograd(cut, batch):
    engine, hidden, call = start(batch, lora_dropout=0.3)
    layer = engine.layers[1]
    x = hidden.clone().requires_grad_()
    out = layer(x, call)
    dout = torch.randn_like(out)
    parameters = [p for group in layer.groups for p in group.parameters]
    expected = dict(
        zip(parameters, torch.autograd.grad(out, [x, *parameters], dout)[1:], strict=True)
    )
    (dx,) = torch.autograd.grad(layer(x, call), x, dout)

    flat = torch.zeros(sum(p.numel() for p in parameters))
    point_sinks(layer.groups, flat)
    with torch.no_grad():
        rows = hidden.view(-1, hidden.shape[-1])
        work = LayerTask(layer, call, batch, Weights(layer), cut)
        torch.testing.assert_close(forward(work, rows), out.view_as(rows), rtol=1e-5, atol=1e-5)
        d = dout.view_as(rows).clone()
        backward(work, rows, d, wants_dx=True)
    torch.testing.assert_close(d, dx.view_as(rows), rtol=1e-4, atol=1e-5)
    ordered = in_flat_order(layer.groups)
    for parameter, found in zip(ordered, flat.split([p.numel() for p in ordered]), strict=True):
        torch.testing.assert_close(
            found.view_as(parameter), expected[parameter], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("first", [0, 5, 2**31 - 3, -7])
def test_a_chunks_mask_is_its_rows_of_the_whole_mask(first):
    engine, _, call = start(lora_dropout=0.4)
    layer = engine.layers[0]
    call.keys[0, layer.key_rows[0], 0] = first
    whole = layer.dropout(layer.qkv, call)
    part = layer.dropout(layer.qkv, call.chunk(slice(11, 17), 1))
    for old, new in zip(whole.keys, part.keys, strict=True):
        expected = keep_mask(old, 30, layer.qkv.inputs, 0.4)[11:17]
        assert torch.equal(keep_mask(new, 6, layer.qkv.inputs, 0.4), expected)
