"""Some heads at a time give what all give at once, forward and backward."""

import pytest
import torch

from lorakit.engine.attach import attach_engine

from .engine_models import segments_of, tiny

CPU = torch.device("cpu")


def prepared(family):
    model = tiny(family)
    engine, _ = attach_engine(model.get_base_model(), CPU)
    ids = torch.arange(3, 23).view(1, 20)
    hidden, call = engine.embed_and_context({"input_ids": ids}, segments_of([12, 8], "cpu"))
    layer = engine.layers[0]
    qkv, _ = layer.qkv.forward(hidden[0], layer.qkv.weight(), layer.dropout(layer.qkv, call))
    qkv = qkv.detach()
    layer.attention.prepare_(qkv, None, call.angles)
    return layer.attention, qkv, call


def test_columns_are_the_heads_of_a_group():
    attention, _, _ = prepared("llama")  # 4 query heads on 2 of keys
    assert attention.columns(slice(None)) == [slice(0, 4), slice(4, 6), slice(6, 8)]
    assert attention.columns(slice(1, 2)) == [slice(2, 4), slice(5, 6), slice(7, 8)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_groups_of_heads_side_by_side_are_the_whole(family):
    attention, qkv, call = prepared(family)
    whole = attention.attend(qkv, call.angles, call.segments, 1, True)
    dout = torch.randn_like(whole.out)
    dqkv = attention.backward(whole, dout, call.angles)
    wide = dqkv.view(20, -1, attention.head)
    for heads in (slice(0, 1), slice(1, 2)):
        own = attention.attend(qkv, call.angles, call.segments, 1, True, heads)
        queries = attention.columns(heads)[0]
        torch.testing.assert_close(own.out, whole.out[:, :, queries])
        found = attention.backward(own, dout[:, :, queries], call.angles)
        expected = torch.cat([wide[:, c] for c in attention.columns(heads)], 1).flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
