"""The fast layers compute what the model's own layers do, for each family and each way to keep."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.engine.attach import attach_engine
from lorakit.engine.decoder_layer import SavedActivations
from lorakit.train.loss import attach_loss, detach_loss

from .engine_models import (
    FAMILIES,
    TARGETS,
    VOCABULARY,
    assert_layers_equal,
    hidden_and_grads,
    segments_of,
    tiny,
    worst,
)


def ids(*shape, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, shape, generator=generator).to(device)


def own(model, tokens, **arguments):
    decoder = model.get_base_model().get_decoder()
    return lambda: decoder(input_ids=tokens, use_cache=False, **arguments)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_every_gradient_equal_the_models_own(family):
    model, tokens = tiny(family), ids(2, 33)
    expected = hidden_and_grads(model, own(model, tokens))
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert "3 fused layers" in path
    for keep in SavedActivations:
        engine.set_checkpointing([keep] * 3)
        assert_layers_equal(model, expected, lambda: engine({"input_ids": tokens}, None))


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["o_proj", "down_proj"], ["up_proj"], ["k_proj", "gate_proj"]]
)
def test_any_choice_of_targets(targets):
    model, tokens = tiny(target_modules=targets), ids(1, 17)
    expected = hidden_and_grads(model, own(model, tokens))
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert_layers_equal(model, expected, lambda: engine({"input_ids": tokens}, None))


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 8}},
        {"alpha_pattern": {"down_proj": 32}},
        {"layers_to_transform": [1]},
    ],
    ids=lambda v: next(iter(v)),
)
def test_variants_that_the_fast_layers_take(lora):
    model, tokens = tiny(**lora), ids(1, 17)
    expected = hidden_and_grads(model, own(model, tokens))
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert_layers_equal(model, expected, lambda: engine({"input_ids": tokens}, None))


def test_biases_of_every_projection_are_served():
    model = tiny(base_changes={"attention_bias": True, "mlp_bias": True})
    tokens = ids(1, 17)
    expected, grads = hidden_and_grads(model, own(model, tokens))
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is not None, path
    for keep in SavedActivations:
        engine.set_checkpointing([keep] * 3)
        found, ours = hidden_and_grads(model, lambda: engine({"input_ids": tokens}, None))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # Without o's bias they are 90% off; in float32 these small ones are 8e-6 off.
        assert worst(ours, grads) < 1e-3


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases train"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks or scales differ within qkv"),
        ({"alpha_pattern": {"up_proj": 32}}, "ranks or scales differ within gate_up"),
        ({"lora_bias": True}, "adapters with a bias"),
    ],
)
def test_what_it_does_not_serve_is_said_and_left_to_peft(lora, reason):
    model = tiny("qwen2", **lora)
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is None
    assert reason in path


def test_dropout_of_attention_is_left_to_the_model():
    """The probe runs without dropout, so it cannot see it."""
    model = tiny(base_changes={"attention_dropout": 0.1})
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is None
    assert "attention dropout" in path


def test_several_adapters_are_left_to_peft():
    model = tiny()
    model.add_adapter("other", model.peft_config["default"])
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is None
    assert "several adapters" in path


def test_another_adapter_that_is_switched_on_takes_the_models_own_path():
    model = tiny()
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    model.add_adapter("other", model.peft_config["default"])
    assert engine.supports(9)
    model.set_adapter("other")
    assert not engine.supports(9)
    model.set_adapter("default")
    assert engine.supports(9)


def test_other_scales_in_a_group_are_seen_before_the_first_step():
    """While B is 0, as at the start of a run, no probe of values can see a scale."""
    model = tiny(alpha_pattern={"q_proj": 32})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is None
    assert "ranks or scales differ within qkv" in path


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "olmo2"])
def test_other_families_keep_their_own_layers(family):
    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    engine, path = attach_engine(base, torch.device("cpu"))
    assert engine is None
    assert family in path


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_layer_that_only_looks_like_llama_is_found_by_the_probe(number, factor):
    model = tiny()
    layer = model.get_base_model().get_decoder().layers[number]
    plain = type(layer).forward
    layer.forward = lambda hidden, **rest: factor * plain(layer, hidden, **rest)
    weight = layer.self_attn.q_proj.base_layer.weight.data.clone()
    engine, path = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is None
    assert "probe differs" in path
    after = layer.self_attn.q_proj.base_layer.weight
    assert torch.equal(after, weight)
    assert after.untyped_storage().nbytes() == after.nbytes  # a storage of its own again


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_packed_documents_do_not_see_one_another(family):
    model = tiny(family)
    lengths = [5, 12, 1, 20]
    tokens = ids(1, sum(lengths))
    places = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    segments = segments_of(lengths, torch.device("cpu"))

    def apart():
        parts = tokens.split(lengths, dim=1)
        return torch.cat([engine({"input_ids": part}, None) for part in parts], dim=1)

    expected, grads = hidden_and_grads(model, apart)
    found, ours = hidden_and_grads(
        model, lambda: engine({"input_ids": tokens, "position_ids": places}, segments)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert worst(ours, grads) < 1e-5


@pytest.mark.parametrize("keep", [SavedActivations.ALL, SavedActivations.INPUT])
def test_dropout_is_peft_dropout_with_masks_from_keys(keep):
    """PEFT's own layers, their dropout replaced by the masks of the same keys, give the same."""
    from lorakit.ops.dropout_mask import draw_keys, keep_mask

    model, tokens = tiny(lora_dropout=0.3), ids(2, 9)
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    engine.set_checkpointing([keep] * 3)
    torch.manual_seed(7)
    found, ours = hidden_and_grads(model, lambda: engine({"input_ids": tokens}, None))

    torch.manual_seed(7)
    keys = draw_keys(3 * 7, torch.device("cpu")).view(3, 7, 2)
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    class Masked(torch.nn.Module):
        def __init__(self, key):
            super().__init__()
            self.key = key

        def forward(self, x):
            mask = keep_mask(self.key, x.shape[:-1].numel(), x.shape[-1], 0.3)
            return x * mask.view(x.shape) / 0.7

    for number, layer in enumerate(model.get_base_model().get_decoder().layers):
        for name, module in layer.named_modules():
            if name.split(".")[-1] in order:
                key = keys[number, order.index(name.split(".")[-1])]
                module.lora_dropout["default"] = Masked(key)
    expected, grads = hidden_and_grads(model, own(model, tokens))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert worst(ours, grads) < 1e-5


def test_evaluation_has_no_dropout_and_switched_off_adapters_take_the_models_own_path():
    model, tokens = tiny(lora_dropout=0.3), ids(1, 9)
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            engine({"input_ids": tokens}, None), own(model, tokens)(), rtol=1e-5, atol=1e-5
        )
    assert engine.supports(9)
    with model.disable_adapter():
        assert not engine.supports(9)
    model.merge_adapter()
    assert not engine.supports(9)


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "up_proj"]], ids=str)
def test_adapters_anywhere_can_be_switched_off(targets):
    model = tiny(target_modules=targets)
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine.supports(9)
    with model.disable_adapter():
        assert not engine.supports(9)
    assert engine.supports(9)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_an_embedding_on_the_host_serves_ids_and_embedded_rows_alike(family):
    model, tokens = tiny(family), ids(2, 9)
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    expected = hidden_and_grads(model, lambda: engine({"input_ids": tokens}, None))
    engine.move_embedding_to_host()
    assert engine.embedding_on_host
    assert_layers_equal(model, expected, lambda: engine({"input_ids": tokens}, None))
    rows = engine.embed_on_host(tokens)
    assert_layers_equal(model, expected, lambda: engine({"inputs_embeds": rows}, None))
    # After training it stays there, and the model's own forward finds it: generation sends its
    # inputs to where the first parameter is.
    own = model.get_base_model().get_decoder()
    before = own(input_ids=tokens)[0]
    engine.detach()
    assert engine.embedding_on_host
    torch.testing.assert_close(own(input_ids=tokens)[0], before)


def test_a_window_shorter_than_the_rows_is_left_to_the_model():
    model = tiny("mistral", base_changes={"sliding_window": 8})
    engine, _ = attach_engine(model.get_base_model(), torch.device("cpu"))
    assert engine is None or not engine.supports(9)


def test_detaching_frees_the_gradient_buffers_of_every_layer():
    engine, _ = attach_engine(tiny().get_base_model(), torch.device("cpu"))
    assert len(engine.groups) == 4 * len(engine.layers) == 12
    for group in engine.groups:
        group.a_grad_buffer, group.b_grad_buffer = torch.empty(1), torch.empty(1)
    engine.detach()
    kept = [(g.a_grad_buffer, g.b_grad_buffer) for g in engine.groups]
    assert kept == [(None, None)] * 12


def test_names_and_files_are_peft_own_and_detaching_frees_the_weights(tmp_path):
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach_loss(model, "on")
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    query = model.get_base_model().get_decoder().layers[0].self_attn.q_proj.base_layer.weight
    assert query.untyped_storage().nbytes() > query.nbytes  # rows of the merged q, k, v
    detach_loss(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("inner", [128, 64])
def test_four_bit_weights_give_what_bitsandbytes_own_layers_give(inner):
    """64 wide inside, o and down have one shape: they must not share a scratch matrix."""
    bnb = pytest.importorskip("bitsandbytes")
    from lorakit.model.random_init import _quantize
    from lorakit.types import Device

    device = Device("cpu", "cpu", 2**34, "float32")
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=inner,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    for layer in base.model.layers:
        _quantize(layer, device, "", set())
    base.is_loaded_in_4bit = True
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, lora_dropout=0.0)
    ).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    assert isinstance(base.model.layers[0].mlp.up_proj.base_layer, bnb.nn.Linear4bit)
    tokens = ids(1, 19)
    expected, grads = hidden_and_grads(model, own(model, tokens))
    engine, path = attach_engine(base, torch.device("cpu"))
    assert engine is not None, path
    for keep in SavedActivations:
        engine.set_checkpointing([keep] * 2)
        found, ours = hidden_and_grads(model, lambda: engine({"input_ids": tokens}, None))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert worst(ours, grads) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients_on_a_gpu_are_as_near_the_truth_as_the_models_own(family):
    wide = {
        "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4,
    }  # fmt: skip
    tokens = ids(2, 257, device="cuda")
    exact_model = tiny(family, torch.float64, "cuda", base_changes=wide)
    _, exact = hidden_and_grads(exact_model, own(exact_model, tokens))
    model = tiny(family, torch.bfloat16, "cuda", base_changes=wide)
    with torch.autocast("cuda", torch.bfloat16):
        _, peft = hidden_and_grads(model, own(model, tokens))
    engine, path = attach_engine(model.get_base_model(), torch.device("cuda"))
    assert "Triton kernels" in path
    for keep in SavedActivations:
        engine.set_checkpointing([keep] * 3)
        _, ours = hidden_and_grads(model, lambda: engine({"input_ids": tokens}, None))
        for name, truth in exact.items():
            error = float((ours[name] - truth).norm() / truth.norm())
            theirs = float((peft[name] - truth).norm() / truth.norm())
            assert error < 1.5 * theirs + 2e-3, name
