"""Compiled layers compute what the model's own layers compute; "eager" runs the traced graph."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.families import tiny_config
from transformers import AutoModelForCausalLM

from lorakit.engine.compiled_layers import CompiledLayers, shared_inputs
from lorakit.model.base_class import text_decoder
from lorakit.model.eval_mode import evaluating

# Gemma's two kinds of layers, one of each.
BOTH = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(family, dropout=0.0, **lora):
    torch.manual_seed(0)
    config = tiny_config(family, **(BOTH if family.startswith("gemma") else {}))
    base = AutoModelForCausalLM.from_config(config).float()
    settings = LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout, **lora)
    model = get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def compiled_of(model, backend="eager", **options):
    base = model.get_base_model()
    decoder = text_decoder(base)
    ids = torch.arange(1, 9).unsqueeze(0)
    with evaluating(base):
        sharing = shared_inputs(decoder, lambda: decoder(input_ids=ids, use_cache=False))
    return CompiledLayers(base, sharing, backend=backend, **options)


def results(model, forward):
    """States, and every adapter gradient of a weighted sum of them."""
    model.zero_grad()
    states = forward()
    (states * torch.arange(states.numel()).cos().view(states.shape)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return states.detach(), gradients


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() < 1e-4 * gradient.norm(), name


def own(model, **inputs):
    return text_decoder(model.get_base_model())(**inputs, use_cache=False)[0]


IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "backend"), [("gemma3_text", "eager"), ("qwen3", "aot_eager"), ("olmo3", "eager")]
)
def test_they_are_the_models_own_layers(family, backend):
    model = adapted(family)
    expected = results(model, lambda: own(model, input_ids=IDS))
    compiled = compiled_of(model, backend)
    assert_equal(results(model, lambda: compiled({"input_ids": IDS})), expected)
    compiled.recompute = True
    assert_equal(results(model, lambda: compiled({"input_ids": IDS})), expected)
    # Outside its passes the model is as it was.
    assert torch.equal(own(model, input_ids=IDS), expected[0])


def test_layers_that_share_an_input_are_one_product():
    compiled = compiled_of(adapted("qwen3"))
    sizes = [[m.group_index for m in group.modules] for group in compiled.linear]
    assert sizes == [[0, 1, 2], [0], [0, 1], [0]] * 2


def test_modules_of_different_ranks_are_multiplied_apart():
    model = adapted("qwen3", rank_pattern={"k_proj": 2})
    expected = results(model, lambda: own(model, input_ids=IDS))
    compiled = compiled_of(model)
    assert [len(group.modules) for group in compiled.linear[:4]] == [1, 1, 1, 1]
    assert_equal(results(model, lambda: compiled({"input_ids": IDS})), expected)


def test_packed_documents_are_as_if_alone():
    model = adapted("gemma3_text")
    compiled = compiled_of(model)
    lengths = (7, 20, 13)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    given = {"position_ids": positions, "cu_seq_lens_q": borders, "max_length_q": 20}
    with torch.no_grad():
        packed = compiled({"input_ids": IDS[:1], **given})
        for start, end in itertools.pairwise(borders):
            alone = own(model, input_ids=IDS[:1, start:end])
            torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-4)


def test_dropout_is_drawn_anew_in_training_and_off_in_evaluation():
    model = adapted("qwen3", dropout=0.5)
    compiled = compiled_of(model)
    assert len(compiled.keys) == 2 * len(TARGETS)
    first, second = (compiled({"input_ids": IDS}) for _ in range(2))
    assert not torch.equal(first, second)
    with evaluating(model):
        torch.testing.assert_close(
            compiled({"input_ids": IDS}), own(model, input_ids=IDS), rtol=1e-4, atol=1e-4
        )


def test_adapters_that_are_switched_off_are_not_supported():
    model = adapted("qwen3")
    compiled = compiled_of(model)
    assert compiled.supported
    with model.disable_adapter():
        assert not compiled.supported
    assert compiled.supported


def test_detach_separates_weights_and_leaves_no_trace():
    model = adapted("qwen3")
    before = {n: p.clone() for n, p in model.named_parameters()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    compiled_of(model).detach()
    pointers = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


def test_any_length_runs_the_same_code():
    model = adapted("gemma3_text")
    compiled = compiled_of(model)
    torch._dynamo.utils.counters.clear()
    for length in (72, 40, 90):
        ids = torch.randint(3, 300, (1, length))
        assert_equal(
            results(model, lambda ids=ids: compiled({"input_ids": ids})),
            results(model, lambda ids=ids: own(model, input_ids=ids)),
        )
    # One code for windows shorter than the row and one for longer ones.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
