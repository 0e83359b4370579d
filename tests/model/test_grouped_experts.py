"""Experts computed by our products equal transformers' own, in 16 bits and in NF4."""

import pytest
import torch
from tests.families import declared_class, tiny_config

from lorakit.model import grouped_experts
from lorakit.model.grouped_experts import (
    GroupedExperts,
    can_group,
    expert_modules,
    group_experts,
    quantize_all,
    release_experts,
    set_dense_bytes,
)

NAMES = ["qwen3_moe", "qwen3_5_moe", "gpt_oss", "gemma4_moe", "glm4_moe_lite", "deepseek_v3",
         "granitemoehybrid", "nemotron_h"]  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    config = tiny_config(name)
    return declared_class(config)(config).requires_grad_(False).eval()


def experts_of(name):
    return next(module for _, module in expert_modules(model_of(name)))


def call(experts, seed=1, tokens=9):
    """(output, gradient of the input, gradient of the router's weights) of one call."""
    torch.manual_seed(seed)
    width = experts.down_proj.shape[-1] if experts.is_transposed else None
    shapes = getattr(experts, "expert_shapes", None)
    shape = shapes["down_proj"] if shapes else experts.down_proj.shape
    width = shape[2] if experts.is_transposed else shape[1]
    x = torch.randn(tokens, width).requires_grad_()
    scores = torch.rand(tokens, 2).requires_grad_()
    number = shape[0]
    index = torch.stack([torch.randperm(number - 1)[:2] for _ in range(tokens)])  # one has none
    y = experts(x, index, scores)
    (y * torch.randn_like(y)).sum().backward()
    return y.detach(), x.grad, scores.grad


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_those_of_transformers(name):
    experts = experts_of(name)
    experts.config._experts_implementation = "eager"  # the loop over experts
    expected = call(experts)
    (grouped,) = group_experts(experts, torch.float32)
    for own, theirs in zip(call(grouped), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    release_experts(experts)
    assert not isinstance(experts, GroupedExperts)
    assert torch.equal(call(experts)[0], expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_4_bit_experts_equal_dequantized_ones(name):
    experts = experts_of(name)
    quantize_all(experts, torch.float32)
    assert {p.dtype for p in (experts.down_proj, *(getattr(experts, n) for n in experts.nf4))} == {
        torch.uint8
    }
    own = call(experts)
    release_experts(experts)
    experts.config._experts_implementation = "eager"
    for mine, theirs in zip(own, call(experts), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_order_of_parameters_which_is_peft_s_nesting_stays():
    experts = experts_of("gpt_oss")
    before = [name for name, _ in experts.named_parameters()]
    quantize_all(experts, torch.bfloat16)
    assert [name for name, _ in experts.named_parameters()] == before


def test_converting_the_model_does_not_touch_the_scales():
    experts = experts_of("qwen3_moe")
    quantize_all(experts, torch.float32)
    before = call(experts)[0]
    experts.to(torch.bfloat16)
    assert experts.nf4["down_proj"].offset.dtype == torch.float32
    assert torch.equal(call(experts)[0], before)


def test_experts_of_another_kind_are_left_alone():
    model = model_of("llama4")
    (first, *_) = [module for _, module in expert_modules(model)]
    assert not can_group(first)
    assert group_experts(model, torch.float32) == []


@pytest.mark.parametrize("four_bit", [False, True])
def test_all_experts_at_once_need_no_count_on_the_host(monkeypatch, four_bit):
    experts = experts_of("qwen3_moe")
    (grouped,) = group_experts(experts, torch.float32)
    if four_bit:
        quantize_all(experts, torch.float32)
    counted = []
    count = grouped.tokens_per_expert
    monkeypatch.setattr(grouped, "tokens_per_expert", lambda e: counted.append(1) or count(e))
    monkeypatch.setattr(grouped_experts, "has_grouped_mm", lambda *_: True)
    few, enough = 3, 8 * grouped.number  # two rows a token, 16 an expert
    expected = call(grouped, tokens=few)
    assert len(counted) == 1
    assert all(torch.isfinite(t).all() for t in expected)
    own = call(grouped, tokens=enough)
    assert len(counted) == 1
    monkeypatch.setattr(grouped, "dense_bytes", 4 * grouped.sizes("down_proj")[0])
    for one, other in zip(own, call(grouped, tokens=enough), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(counted) == 2  # their dense weights are too large


def test_dense_weights_take_a_hundredth_of_the_memory():
    experts = experts_of("qwen3_moe")
    (grouped,) = group_experts(experts, torch.float32)
    assert grouped.dense_bytes == grouped_experts.GROUP_BYTES
    set_dense_bytes(experts, 140 * 2**30)
    assert grouped.dense_bytes == 140 * 2**30 // 100
    set_dense_bytes(experts, 8 * 2**30)
    assert grouped.dense_bytes == grouped_experts.GROUP_BYTES
