"""A base that a program loaded is trained as its files are, or refused with the difference."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.finetuned import same, trainer_in
from transformers import AutoModelForCausalLM

from lorakit.errors import ModelError
from lorakit.hardware import detect_device
from lorakit.model.load import nf4_config


@pytest.fixture
def train(tiny_model_dir, tmp_path):
    return trainer_in(tmp_path, tiny_model_dir)


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def test_a_loaded_base_is_trained_as_its_files(train, base):
    of_name = train("name", dtype="float32")
    run = train("object", model=base)
    assert same(run, of_name)
    assert run.recipe.dtype == "float32"
    assert any("lora" in name for name, _ in base.named_parameters())  # it is trained in place
    assert run.chat("a question", max_new_tokens=2) is not None


def test_a_peft_model_goes_on_from_its_adapter(train, base, tiny_model_dir):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    run = train(model=model, learning_rate=1e-9)
    after = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), run.adapter
    )
    found = dict(after.named_parameters())
    assert before
    for name, value in before.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)
    assert run.recipe.target_modules == ["q_proj"]


def test_a_base_in_four_bits_is_taken_as_qlora(train, tiny_model_dir):
    device = detect_device("float32", prefer="cpu")
    settings = nf4_config(device, ["lm_head"])
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    run = train("object", model=base, val_size=0)
    assert (run.recipe.method, run.recipe.dtype) == ("qlora", "float32")
    assert same(run, train("name", method="qlora", dtype="float32", val_size=0))
    settings.bnb_4bit_use_double_quant = False
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    with pytest.raises(ModelError, match="bnb_4bit_use_double_quant=False, expected True"):
        train("other", model=base)


def test_a_base_that_is_not_its_files_is_refused(train, base):
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight of the object is not"):
        train(model=base)
    base.config._name_or_path = ""
    with pytest.raises(ModelError, match="does not name the files"):
        train(model=base)
    with pytest.raises(ModelError, match="model is a Linear, expected"):
        train(model=torch.nn.Linear(1, 1))
