"""Experts in host memory give the same step, and only two layers of them are on the device."""

import pytest
import torch
from tests.families import declared_class, tiny_config

from lorakit.engine.attach_compiled import attach_compiled
from lorakit.engine.expert_streaming import StreamedExperts
from lorakit.model.grouped_experts import expert_modules, group_experts, quantize_all
from lorakit.model.lora_config import add_adapter
from lorakit.recipe.schema import Recipe
from lorakit.train import loss as loss_module
from lorakit.train.loss import attach_loss, base_of
from lorakit.types import Placement

CPU = torch.device("cpu")


def model_of(name="qwen3_moe", four_bit=True, layers=4, dropout=0.0):
    torch.manual_seed(0)
    config = tiny_config(name, num_hidden_layers=layers)
    base = declared_class(config)(config)
    if four_bit:
        quantize_all(base, torch.float32)
    else:
        group_experts(base, torch.float32)
    recipe = Recipe(
        model="m", data="d", expert_adapters="all", target_modules=["q_proj"], lora_dropout=dropout
    )
    model = add_adapter(base, recipe).train()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model


def step(model):
    """(loss, gradients) of one micro-batch."""
    ids = torch.arange(4, 28).view(2, 12)
    loss = model(
        input_ids=ids, targets=ids.flatten()[1:9], positions=torch.arange(8), use_cache=False
    ).loss_sum
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_streamed_experts_give_the_same_gradients(name, four_bit):
    model = model_of(name, four_bit)
    attach_loss(model)
    expected = [step(model), step(model)]
    attach_loss(model, placement=Placement(experts_on_host=True))
    for loss, gradients in expected:
        own_loss, own = step(model)
        assert torch.equal(own_loss, loss)
        assert own.keys() == gradients.keys()
        assert all(torch.equal(own[n], gradients[n]) for n in own)


def test_streamed_experts_work_between_compiled_code(monkeypatch):
    """Each fetches its weights, and draws its masks again, also where its layer is recomputed."""
    torch._dynamo.reset()
    monkeypatch.setattr(loss_module, "unfused_reason", lambda *_: None)
    monkeypatch.setattr(loss_module, "has_matrix_kernels", lambda _: True)
    monkeypatch.setattr(loss_module, "attach_compiled", lambda base: attach_compiled(base, "eager"))
    model = model_of(layers=3, dropout=0.3)
    base_of(model).gradient_checkpointing_disable()
    attached = attach_loss(model, "on", placement=Placement(experts_on_host=True))
    assert attached.compiled is not None, attached.layers
    results = []
    for recompute in (False, True):
        attached.compiled.recompute = recompute
        torch.manual_seed(1)
        results.append(step(model))
    (loss, gradients), (again, repeated) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(repeated[name], gradients[name]) for name in gradients)
    torch._dynamo.reset()


def test_each_layer_is_copied_twice_a_micro_batch_and_two_are_resident(monkeypatch):
    model = model_of()
    streamed = StreamedExperts(base_of(model), CPU)
    attach_loss(model)  # its probes run the layers too
    copies, resident = [], []
    slots, number = streamed.streamed.slots, len(streamed.experts)
    for index, room in enumerate(slots.rooms):
        own = room.fill
        monkeypatch.setattr(
            room, "fill", lambda place, own=own, index=index: (copies.append(index), own(place))
        )
    for module in streamed.experts:
        module.register_forward_hook(lambda *_: resident.append(list(slots.resident)))
    step(model)
    first = list(copies)
    step(model)
    assert number == 4
    # Twice each, but for the two that are resident where a pass ends and the next one begins.
    assert copies[len(first) :] == [2, 3, 1, 0]
    assert all(len(pair) == 2 for pair in resident)
    buffers = sum(buffer.nbytes for buffer in slots.buffers)
    assert buffers == 2 * max(room.size for room in slots.rooms)


def test_plain_experts_of_a_run_that_adapts_others_are_streamed_too():
    torch.manual_seed(0)
    config = tiny_config("qwen3_moe", num_hidden_layers=3)
    base = declared_class(config)(config)
    recipe = Recipe(model="m", data="d", target_modules=["q_proj"], lora_dropout=0.0)
    model = add_adapter(base, recipe).train()
    base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    attach_loss(model)
    loss, gradients = step(model)
    attach_loss(model, placement=Placement(experts_on_host=True))
    assert len(base.lorakit_experts.experts) == 3
    own_loss, own = step(model)
    torch.testing.assert_close(own_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_model_has_no_experts_of_its_own_on_the_device():
    model = model_of()
    streamed = StreamedExperts(base_of(model), CPU)
    host = {room.bytes.untyped_storage().data_ptr() for room in streamed.streamed.host_buffers}
    for _, module in expert_modules(model):
        for name in module.expert_shapes:
            assert getattr(module, name).untyped_storage().data_ptr() in host
