"""Tiny random models of the families on the fast path, with adapters that do something."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.engine.attention import Segments
from lorakit.types import IGNORE, Example, Origin

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
VOCABULARY = 300


def tiny(
    family="llama",
    dtype=torch.float32,
    device="cpu",
    base_changes=None,
    attention="sdpa",
    **lora,
):
    """A PEFT model in training mode: 3 layers, 64 wide, 4 heads on 2, random norms and biases."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        **FAMILIES.get(family, {}),
        **(base_changes or {}),
    }
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **values)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in base.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    base = base.to(device=device, dtype=dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "lora_dropout": 0.0, **lora}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def examples(lengths, vocabulary=VOCABULARY):
    """Random examples of these lengths; the first third of each is prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = 1 + length // 3
        made.append(Example(tokens, [IGNORE] * prompt + tokens[prompt:], Origin("x", number)))
    return made


def hidden_and_grads(model, forward):
    """Hidden states of `forward()` and every adapter gradient of a fixed weighted sum of them."""
    model.zero_grad()
    hidden = forward()
    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view(hidden.shape)
    (hidden.float() * weights).sum().backward()
    return hidden.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def worst(found, expected):
    """Largest relative difference of two dictionaries of gradients."""
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items())


def segments_of(lengths, device):
    """Borders of documents of these lengths in one row."""
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Segments(borders.to(device), max(lengths), tuple(lengths))


def assert_layers_equal(model, expected, forward):
    """Hidden states and every adapter gradient of `forward()` are those `expected`."""
    found, ours = hidden_and_grads(model, forward)
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    assert worst(ours, expected[1]) < 1e-5
