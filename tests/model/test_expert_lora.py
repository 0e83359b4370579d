"""Adapters of experts: PEFT's layout and values, exact gradients, dropout, nothing untouched."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.families import declared_class, tiny_config
from tests.model.test_grouped_experts import NAMES

from lorakit.model.expert_lora import ExpertLora, adapt_experts, expert_parameters, load_tuned
from lorakit.model.grouped_experts import expert_modules, quantize_all

SETTINGS = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def model_of(name):
    torch.manual_seed(0)
    config = tiny_config(name)
    return declared_class(config)(config)


def tuned(name, four_bit=False, dropout=0.0):
    """A model with adapted experts, B random, whose experts are grouped."""
    base = model_of(name)
    if four_bit:
        quantize_all(base, torch.float32)
    settings = LoraConfig(**{**SETTINGS, "target_modules": r".*\.(q_proj|q_a_proj)"},
                          lora_dropout=dropout)  # fmt: skip
    adapt_experts(settings, base)
    torch.manual_seed(1)
    model = get_peft_model(base, settings)
    torch.manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def wrappers(model):
    return [m for m in model.modules() if isinstance(m, ExpertLora)]


def ids():
    return torch.arange(24).view(2, 12) * 7 % 320


def loss(model):
    logits = model(input_ids=ids(), use_cache=False).logits
    torch.manual_seed(3)
    return (logits * torch.randn_like(logits)).sum() / 100


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_peft(name, tmp_path):
    model = tuned(name)
    model.peft_config["default"].lora_dropout = 0.0
    model.save_pretrained(tmp_path)
    plain_base = model_of(name)
    plain = PeftModel.from_pretrained(plain_base, tmp_path, is_trainable=True)
    assert not wrappers(plain)
    own, theirs = loss(model), loss(plain)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    own.backward()
    theirs.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected.pop(parameter_name), rtol=1e-3, atol=1e-5
            )
    assert not expected


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_4_bit_experts_load_into_dequantized_ones(name, tmp_path):
    model = tuned(name, four_bit=True).eval()
    model.save_pretrained(tmp_path)
    plain_base = model_of(name)
    quantize_all(plain_base, torch.float32)
    for _, module in list(expert_modules(plain_base)):
        module.release()
    plain = PeftModel.from_pretrained(plain_base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loss(model), loss(plain), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="in 4 bits cannot be merged"):
        model.merge_adapter()


def test_a_saved_adapter_is_attached_to_4_bit_experts_again(tmp_path):
    model = tuned("qwen3_moe", four_bit=True).eval()
    model.save_pretrained(tmp_path)
    base = model_of("qwen3_moe")
    quantize_all(base, torch.float32)
    again = load_tuned(base, tmp_path).eval()
    assert len(wrappers(again)) == 4
    with torch.no_grad():
        assert torch.equal(loss(again), loss(model))
        with again.disable_adapter(), model.disable_adapter():
            assert torch.equal(loss(again), loss(model))


def test_an_expert_changes_exactly_if_it_received_tokens():
    model = tuned("qwen3_moe")
    received = {}
    for path, module in expert_modules(model):
        module.register_forward_pre_hook(
            lambda _, args, path=path: received.__setitem__(path, set(args[1].flatten().tolist()))
        )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], weight_decay=0.0
    )
    model(input_ids=ids()[:1, 1:4], use_cache=False).logits.square().sum().backward()
    optimizer.step()
    for path, experts in received.items():
        root = path.removesuffix(".base_layer.base_layer")
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.startswith(f"{root}.") or not parameter.requires_grad:
                continue
            change = parameter.detach() - before[parameter_name]
            number = 8
            change = (
                change.view(number, -1)
                if "lora_A" in parameter_name
                else change.view(len(change), -1, number).permute(2, 0, 1).flatten(1)
            )
            changed = {e for e in range(number) if change[e].abs().max() > 0}
            assert changed == experts, parameter_name
    assert any(len(experts) < 8 for experts in received.values())


def test_dropout_masks_a_share_of_the_inputs_in_training_only():
    model = tuned("qwen3_moe", dropout=0.5).train()
    torch.manual_seed(5)
    first, second = loss(model), loss(model)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(loss(model), first)
    model.eval()
    assert torch.equal(loss(model), loss(model))
    mean = torch.stack([loss(model.train()) for _ in range(40)]).mean()
    torch.testing.assert_close(mean, loss(model.eval()), rtol=0.3, atol=0.3)


def test_recomputation_draws_the_same_masks():
    model = tuned("qwen3_moe", dropout=0.5).train()
    torch.manual_seed(5)
    loss(model).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    loss(model).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_names_of_raw_tensors():
    assert expert_parameters(model_of("qwen3_moe")) == [
        "experts.down_proj", "experts.gate_up_proj"
    ]  # fmt: skip
    assert expert_parameters(model_of("nemotron_h")) == ["experts.down_proj", "experts.up_proj"]
    assert expert_parameters(model_of("qwen3")) == []


def test_the_saved_config_has_no_dropout_which_peft_would_refuse(tmp_path):
    from lorakit.model.lora_config import add_adapter
    from lorakit.recipe.schema import Recipe

    recipe = Recipe(model="m", data="d", expert_adapters="all", target_modules=["q_proj"])
    model = add_adapter(model_of("qwen3_moe"), recipe)
    assert [w.p for w in wrappers(model)] == [0.05] * 4
    assert model.get_base_model().model.layers[0].self_attn.q_proj.lora_dropout["default"].p == 0.05
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == 0.0
    assert sorted(saved["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
    PeftModel.from_pretrained(model_of("qwen3_moe"), tmp_path)
