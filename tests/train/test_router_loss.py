"""The balance of experts is the loss that transformers computes, and off by default."""

import pytest
import torch
from tests.families import declared_class, tiny_config
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lorakit.train.loss import attach_loss, compile_layers
from lorakit.train.router_loss import RouterLoss, balance, find_routers


def model_of(name):
    torch.manual_seed(0)
    config = tiny_config(name)
    return declared_class(config)(config)


def test_the_value_is_that_of_transformers():
    torch.manual_seed(0)
    layers = [torch.randn(24, 8) for _ in range(3)]
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    expected = load_balancing_loss_func(tuple(layers), 8, 2, mask)
    real = mask.flatten().bool()
    torch.testing.assert_close(balance(torch.cat([x[real] for x in layers]), 2), expected)
    torch.testing.assert_close(
        balance(torch.cat(layers), 2), load_balancing_loss_func(tuple(layers), 8, 2)
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe", "gpt_oss", "granitemoehybrid"])
def test_every_layer_with_experts_has_one_router(name):
    model = model_of(name)
    routers = find_routers(model)
    assert len(routers) == model.config.get_text_config().num_hidden_layers
    ids = torch.arange(16).view(2, 8)
    with RouterLoss(model, 1.0).collecting() as logits:
        model(input_ids=ids)
    experts = routers[0].weight.shape[0]
    assert [tuple(x.shape) for x in logits] == [(16, experts)] * len(routers)


def loss_of(model, coefficient, **more):
    attach_loss(model, router_aux_loss_coef=coefficient)
    ids, positions = torch.arange(4, 20).view(2, 8), torch.arange(3)
    return model(
        input_ids=ids, targets=ids.flatten()[1:4], positions=positions, use_cache=False, **more
    ).loss_sum


def test_it_is_added_in_training_only_and_per_trained_token():
    model = model_of("qwen3_moe").train()
    plain, more = loss_of(model, 0.0), loss_of(model, 0.5)
    with RouterLoss(model, 1.0).collecting() as logits:
        model(input_ids=torch.arange(4, 20).view(2, 8))
    torch.testing.assert_close(more - plain, 0.5 * 3 * balance(torch.cat(logits), 2))
    model.eval()
    torch.testing.assert_close(loss_of(model, 0.5), plain)


def test_padding_does_not_count_and_recomputation_counts_once():
    model = model_of("qwen3_moe").train()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    kept = loss_of(model, 0.5, attention_mask=mask)
    kept.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = loss_of(model, 0.5, attention_mask=mask)
    again.backward()
    torch.testing.assert_close(again, kept)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, gradient)
    assert (loss_of(model, 0.5) - kept).abs() > 1e-4


def test_layers_are_not_compiled_with_it():
    """Compiled layers have no mask, and their routers no hooks."""
    compiled, reason = compile_layers(model_of("qwen3_moe"), "no fast path", "on", 0.1)
    assert compiled is None
    assert reason == "no fast path; router_aux_loss_coef needs the model's own layers"
