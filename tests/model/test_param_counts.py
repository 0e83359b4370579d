"""What is counted, and where: linear layers, experts, embeddings, one head or none of its own."""

import pytest
from transformers import AutoConfig

from lorakit.model.param_counts import count, count_trainable
from lorakit.planning.known_models import shape_config
from lorakit.recipe.schema import Recipe


def test_a_head_that_is_the_embedding_is_counted_once():
    tied, own = count(shape_config("smollm2-135m")), count(shape_config("llama-2-7b"))
    assert tied.head == 0
    assert tied.embedding == 49152 * 576
    assert own.head == own.embedding == 32000 * 4096
    norms = own.total - own.in_linear - own.embedding - own.head
    assert norms == (2 * 32 + 1) * 4096


def test_experts_are_raw_tensors_and_no_linear_layers():
    found = count(shape_config("qwen3-30b-a3b"))
    assert found.experts == 48 * 128 * 3 * 2048 * 768
    assert not [name for name, _, _ in found.linear if "expert" in name]
    # bitsandbytes replaces nn.Linear alone, so this is all that QLoRA would quantize.
    assert found.in_linear == 48 * 2 * 2048 * (32 * 128 + 4 * 128)


def test_experts_are_still_left_alone_by_bitsandbytes():
    """Red when a new transformers or bitsandbytes quantizes them: the plan must then follow."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_experts": 4, "vocab_size": 128}
    config = AutoConfig.for_model(**{**shape_config("qwen3-30b-a3b").to_dict(), **small})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    replace_with_bnb_linear(model, ["lm_head"], BitsAndBytesConfig(load_in_4bit=True))
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {"Linear4bit"}
    shapes = [p.dim() for n, p in model.named_parameters() if "experts" in n]
    assert shapes == [3, 3]


def test_gpt2_keeps_its_weights_the_other_way_round():
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=32)
    assert ("transformer.h.0.attn.c_attn", 8, 24) in count(config).linear


def test_the_same_config_is_built_once():
    assert count(shape_config("tiny")) is count(shape_config("tiny"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj", "down_proj"], "lora_r": 3},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"exclude_modules": ["v_proj"], "layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_what_trains_is_what_peft_trains(values):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from lorakit.model.lora_config import lora_config

    asked = Recipe(**{"model": "m", "data": "d", "target_modules": ["q_proj", "v_proj"], **values})
    config = shape_config("tiny")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora_config(asked))
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_trainable(asked, count(config)) == real
