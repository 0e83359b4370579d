"""Targets come from the family; unknown families say so; logit transforms follow the config."""

from types import SimpleNamespace

import torch

from lorakit.model.architectures import FAMILIES, lora_targets, transform_logits


def test_llama_gets_the_seven_linears_of_the_seed():
    targets, reason = lora_targets(SimpleNamespace(model_type="llama"))
    assert targets == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert reason == "model family llama"


def test_an_unknown_family_is_trained_on_all_linears_and_says_so():
    targets, reason = lora_targets(SimpleNamespace(model_type="novel"))
    assert targets == "all-linear"
    assert "novel is not in the table" in reason


def test_targets_of_a_family_exist_in_its_models():
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite"):
        config = AutoConfig.for_model(family, **small, pad_token_id=0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = {name.split(".")[-1] for name, _ in model.named_modules()}
        assert set(FAMILIES[family]) <= names, family


def test_logit_transforms():
    logits = torch.tensor([100.0, -1.0])
    capped = transform_logits(SimpleNamespace(final_logit_softcapping=30.0), logits)
    torch.testing.assert_close(capped, 30.0 * torch.tanh(torch.tensor([100 / 30, -1 / 30])))
    granite = SimpleNamespace(model_type="granite", logits_scaling=4.0)
    assert transform_logits(granite, logits)[0] == 25.0
    assert transform_logits(SimpleNamespace(model_type="llama"), logits) is logits
