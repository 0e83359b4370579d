"""Compiled layers are used only if they compute what the model computes."""

import pytest
import torch
from tests.engine.test_compiled_layers import IDS, adapted, own

from lorakit.engine import attach_compiled as module
from lorakit.engine.attach_compiled import attach_compiled, probe_inputs
from lorakit.train import loss as loss_module
from lorakit.train.loss import attach_loss, detach_loss
from lorakit.train.packing import PACKED


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_layers_that_agree_are_used_and_the_adapters_are_as_before():
    model = adapted("gemma3_text", dropout=0.2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    compiled, words = attach_compiled(model.get_base_model(), "eager")
    assert compiled is not None, words
    assert words.startswith("2 compiled layers; probe differs by 0.00%")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.training


def test_the_probe_is_longer_than_the_window():
    base = adapted("gemma3_text").get_base_model()
    assert probe_inputs(base)["input_ids"].shape[1] > base.config.sliding_window


def test_attention_that_the_kernels_do_not_have_stays_that_of_transformers():
    compiled, words = attach_compiled(adapted("gemma2").get_base_model(), "eager")
    assert compiled is not None, words
    assert "attention of transformers" in words


def test_layers_that_differ_are_not_used(monkeypatch):
    real = module._gradients
    calls = []

    def wrong(layer, args, kwargs):
        calls.append(1)
        states, gradients = real(layer, args, kwargs)
        return states, [g * (1.5 if len(calls) % 2 == 0 else 1.0) for g in gradients]

    monkeypatch.setattr(module, "_gradients", wrong)
    model = adapted("qwen3")
    expected = own(model, input_ids=IDS)
    compiled, words = attach_compiled(model.get_base_model(), "eager")
    assert compiled is None
    assert "gradients by 50.0% from the model's own" in words
    assert torch.equal(own(model, input_ids=IDS), expected)


def test_a_difference_that_is_no_number_is_a_difference(monkeypatch):
    monkeypatch.setattr(module, "differences", lambda *_: (float("nan"), 0.0))
    compiled, words = attach_compiled(adapted("qwen3").get_base_model(), "eager")
    assert compiled is None
    assert "differ by nan%" in words


def test_a_failure_of_the_compiler_is_a_reason(monkeypatch):
    def failing(*_):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(module, "differences", failing)
    compiled, words = attach_compiled(adapted("qwen3").get_base_model(), "eager")
    assert compiled is None
    assert words == "cannot be compiled (RuntimeError: no compiler): PEFT's own layers"


@pytest.mark.parametrize("asked", ["auto", "on"])
def test_the_loss_uses_them_for_measured_families_or_if_asked(asked, monkeypatch):
    monkeypatch.setattr(loss_module, "has_matrix_kernels", lambda _: True)
    monkeypatch.setattr(
        loss_module, "unfused_reason", lambda asked, _: "off" if asked == "off" else None
    )
    monkeypatch.setattr(loss_module, "attach_compiled", lambda base: attach_compiled(base, "eager"))
    model = adapted("olmo3" if asked == "on" else "gemma3_text")
    where = torch.arange(10, 30)
    batch = {"input_ids": IDS, "positions": where, "targets": IDS.flatten()[where + 1]}
    plain = attach_loss(model, "off")
    assert plain.own_layers
    expected = model(**batch, use_cache=False).loss_sum
    detach_loss(model)
    attached = attach_loss(model, asked)
    assert attached.compiled is not None, attached.layers
    assert attached.packing == PACKED
    found = model(**batch, use_cache=False).loss_sum
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward()
    detach_loss(model)
    if asked == "auto":  # a family that was not measured is compiled only if asked
        assert attach_loss(adapted("olmo3"), asked).compiled is None
