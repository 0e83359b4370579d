"""Widths are read off the layers themselves, of every kind of layer."""

import pytest
import torch
from tests.families import FAMILIES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.model.layer_widths import expert_elements, setting
from lorakit.model.param_counts import count
from lorakit.planning.known_models import shape_config


def widths(name, **changes):
    return count(tiny_config(name, **changes)).layers


def test_a_llama_layer():
    (layer,) = set(count(shape_config("llama-2-7b")).layers)
    model, inner = 4096, 11008
    assert layer.products == 4 * model**2 + 3 * model * inner
    assert layer.moved == 4 * 2 * model + 3 * (model + inner)
    assert (layer.queries, layer.keys_values, layer.inner) == (model, 2 * model, inner)


def test_grouped_keys_and_fused_products():
    (grouped,) = set(count(shape_config("llama-3.1-8b")).layers)
    assert (grouped.queries, grouped.keys_values) == (4096, 2 * 8 * 128)
    (fused,) = set(count(AutoConfig.for_model("phi3", **SMALL)).layers)
    assert (fused.queries, fused.keys_values, fused.inner) == (64, 64, 128)
    gpt2 = AutoConfig.for_model("gpt2", n_layer=2, n_embd=8, n_head=2, vocab_size=32)
    (other,) = set(count(gpt2).layers)
    assert (other.queries, other.keys_values, other.inner) == (8, 16, 32)
    assert other.products == 8 * (24 + 8 + 32 + 32)


SMALL = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_convolution_is_no_expert(name):
    found = count(tiny_config(name))
    layers = len(found.layers)
    expected = 0
    if "moe" in name or name == "qwen3_next":
        expected = layers * (4 if name == "granitemoehybrid" else 8) * 3 * 64 * 32
    assert found.experts == expected
    assert 0 < found.in_linear < found.total - found.experts


def test_a_token_meets_the_experts_it_is_sent_to():
    two, four = (widths("qwen3_moe", num_experts_per_tok=n)[0].products for n in (2, 4))
    assert four - two == 2 * 3 * 64 * 32
    assert widths("gemma4_moe", top_k_experts=4)[0].inner == 4 * 32


def test_layers_without_softmax_attention_have_no_queries():
    assert [w.queries for w in widths("qwen3_5")] == [0, 0, 0, 64]
    assert [w.queries for w in widths("lfm2")] == [0, 0, 64, 0]
    assert [w.queries for w in widths("granitemoehybrid")] == [0, 0, 64, 0]
    # Both side by side.
    assert [w.queries for w in widths("falcon_h1")] == [64, 64]


def test_every_layer_has_widths_of_its_own():
    """Gemma 4's config refuses to say one head size, Gemma 3n's holds a list of inner widths."""
    assert [w.queries for w in widths("gemma4")] == [64, 128, 64, 128]
    assert [w.inner for w in widths("gemma3n_text")] == [128, 128, 192, 192]


def test_a_text_does_not_meet_the_vision_tower():
    wrapped, alone = widths("qwen3_5"), widths("qwen3_5_text")
    assert wrapped == alone
    assert count(tiny_config("qwen3_5")).in_linear >= sum(w.products for w in wrapped)


def test_a_module_for_each_expert():
    """As models keep them whose code is older than raw expert tensors."""
    from lorakit.model import layer_widths

    layer = torch.nn.ModuleDict({
        "experts": torch.nn.ModuleList(torch.nn.Linear(8, 4, bias=False) for _ in range(6)),
    })  # fmt: skip
    config = AutoConfig.for_model("qwen3_moe", hidden_size=8, num_experts=6, num_experts_per_tok=2)
    assert layer_widths._widths(layer, config, None).products == pytest.approx(2 * 8 * 4)


def test_a_setting_may_be_a_list_or_refuse_to_be_read():
    class Config:
        many = (2, 8, 4)
        none = None

        @property
        def refused(self):
            raise RuntimeError("is a per-layer attribute")

    assert setting(Config, ["missing", "none", "many"]) == 8
    assert setting(Config(), ["refused", "many"]) == 8
    assert setting(Config, ["missing"]) is None


def test_three_dimensions_do_not_make_an_expert():
    assert expert_elements("mixer.conv1d", torch.nn.Conv1d(4, 4, 3, groups=4)) == 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    experts = model.get_decoder().layers[0].mlp.experts
    assert expert_elements("mlp.experts", experts) == 8 * 3 * 64 * 32
