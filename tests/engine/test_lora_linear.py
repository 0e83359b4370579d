"""One group against its modules: products, gradients, merged storage, sinks."""

import pytest
import torch

from lorakit.engine.lora_linear import Dropout, FusedLoraLinear, Unsupported, refresh

from .engine_models import tiny

NONE = Dropout(None, 0.0)


def group_of(**lora):
    model = tiny("qwen2", **lora)  # q, k and v with biases
    attention = model.get_base_model().model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    group = FusedLoraLinear("qkv", modules, {})
    group.merge()
    refresh([group], training=True)
    return group, modules


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"], ["o_proj"]]
)
def test_product_and_gradients_are_those_of_the_modules(targets):
    group, modules = group_of(target_modules=targets)
    x = torch.randn(9, 64, requires_grad=True)
    y = torch.cat([m(x) for m in modules], -1)
    dy = torch.randn_like(y)
    y.backward(dy)
    with torch.no_grad():
        weight = group.weight()
        product, update = group.product(x, weight, NONE)
        made = product.clone()
        for module, columns in enumerate(group.columns):
            if update is not None and update.slots[module] >= 0:
                s, b = update.of(module, columns)
                made[:, columns] += s @ b.t()
        torch.testing.assert_close(made, y)
        ds, db = group.output_grads(dy, update)
        torch.testing.assert_close(group.input_grad(dy, ds, weight, NONE), x.grad)
        grads = group.factor_grads(ds, db, x, NONE, training=True)
    for parameter, found in zip(group.parameters, grads, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-4)


def test_merged_modules_hold_views_until_they_are_unmerged():
    group, modules = group_of()
    weight = modules[1].base_layer.weight
    assert weight.data_ptr() == group.merged[group.columns[1]].data_ptr()
    before = weight.clone()
    group.unmerge()
    assert torch.equal(weight, before)
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_sinks_take_the_gradients_instead():
    group, _ = group_of()
    x, dy = torch.randn(9, 64), torch.randn(9, group.outputs)
    with torch.no_grad():
        _, update = group.product(x, group.weight(), NONE)
        ds, db = group.output_grads(dy, update)
        expected = group.factor_grads(ds, db, x, NONE, training=True)
        group.a_sink, group.b_sink = torch.ones_like(group.a), torch.ones_like(db)
        ds, db = group.output_grads(dy, update)
        assert set(group.factor_grads(ds, db, x, NONE, training=True)) == {None}
    torch.testing.assert_close(group.a_sink, 1 + torch.cat(expected[0::2]))
    torch.testing.assert_close(group.b_sink, 1 + torch.cat(expected[1::2]))


def test_copies_of_a_carry_scale_and_dropout():
    group, modules = group_of(lora_dropout=0.5)
    own = modules[0].lora_A["default"].weight
    torch.testing.assert_close(group.a[:4], own.data * 2.0 / 0.5)
    refresh([group], training=False)
    torch.testing.assert_close(group.a[:4], own.data * 2.0)


@pytest.mark.parametrize("targets", [["o_proj"], ["q_proj"]])
def test_the_full_output_has_residual_bias_and_adapter(targets):
    model = tiny(base_changes={"attention_bias": True}, target_modules=targets)
    module = model.get_base_model().model.layers[0].self_attn.o_proj
    group = FusedLoraLinear("o", [module], {})
    group.merge()
    refresh([group], training=True)
    with torch.no_grad():
        x, residual = torch.randn(9, 64), torch.randn(9, 64)
        out, update = group.full(x, group.weight(), NONE, residual)
        torch.testing.assert_close(out, residual + module(x))
    assert (update is not None) == (targets == ["o_proj"])


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("odd", ["q_proj", "v_proj"])
def test_ranks_and_scales_that_differ_are_refused(pattern, odd):
    with pytest.raises(Unsupported, match="ranks or scales differ within qkv"):
        group_of(**{pattern: {odd: 2}})


def test_trained_base_weights_are_refused():
    model = tiny()
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(Unsupported, match="base weights train"):
        FusedLoraLinear("qkv", [attention.q_proj], {})
