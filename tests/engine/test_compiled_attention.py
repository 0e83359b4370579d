"""Attention of compiled layers: windows and documents, against one document at a time."""

import pytest
import torch
from transformers import AttentionInterface, AutoConfig

from lorakit.engine.compiled_attention import DEFINITION, attention_of, register
from lorakit.engine.lora_linear import Unsupported

CPU = torch.device("cpu")


class Module:
    is_causal = True


def tensors(tokens, heads=4, key_heads=2):
    torch.manual_seed(0)
    return [torch.randn(1, count, tokens, 8) for count in (heads, key_heads, key_heads)]


def attention(*arguments, **more):
    return AttentionInterface()[register(CPU)](Module(), *arguments, None, scaling=0.5, **more)[0]


def by_definition(q, k, v, window):
    """Softmax over the window's keys, in plain torch; [1, T, H, d]."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    place = torch.arange(q.shape[2])
    distance = place[:, None] - place[None, :]
    scores = (q @ k.transpose(-1, -2) * 0.5).masked_fill(
        (distance < 0) | (distance >= window), float("-inf")
    )
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_a_row_attends_to_its_window(window):
    q, k, v = tensors(12)
    found = attention(q, k, v, sliding_window=window)
    torch.testing.assert_close(found, by_definition(q, k, v, window or 12))


@pytest.mark.parametrize("window", [None, 3])
def test_documents_of_a_packed_row_are_as_if_alone(window):
    q, k, v = tensors(12)
    borders = torch.tensor([0, 5, 6, 12, 12], dtype=torch.int32)  # the last one is padding
    found = attention(q, k, v, sliding_window=window, cu_seq_lens_q=borders, max_length_q=6)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        part = [t[:, :, start:end] for t in (q, k, v)]
        torch.testing.assert_close(found[:, start:end], by_definition(*part, window or 12))


@pytest.mark.parametrize(
    "more", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}]
)
def test_what_the_kernels_do_not_compute_is_refused(more):
    with pytest.raises(Unsupported, match="attention with"):
        attention(*tensors(4), **more)


def test_the_name_is_restored():
    config = AutoConfig.for_model("qwen3")
    config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError), attention_of(config, DEFINITION):
        assert config._attn_implementation == DEFINITION
        raise RuntimeError
    assert config._attn_implementation == "sdpa"
