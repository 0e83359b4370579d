"""Experts are quantized while they are read: bitsandbytes' values, one tensor at a time."""

import json

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from tests.model.test_families import make_base, pack_experts
from transformers import AutoModelForCausalLM

from lorakit.errors import ModelError
from lorakit.hardware import detect_device
from lorakit.model import grouped_experts
from lorakit.model.grouped_experts import GroupedExperts, expert_modules
from lorakit.model.load import load_base, load_config
from lorakit.ops.nf4 import dequantize_nf4_plain
from lorakit.recipe.loader import load_recipe


def loaded(folder, **values):
    flags = {"model": str(folder), "data": "d", "offline": True, "dtype": "float32"}
    recipe = load_recipe(None, [], {**flags, "method": "qlora", **values}).recipe
    return load_base(recipe, str(folder), detect_device("float32", "cpu"))


def round_trip(weight):
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_nf4_plain(packed, state)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoehybrid", "gemma4_moe"])
def test_every_expert_has_bitsandbytes_values_and_none_is_left_in_16_bits(name, tmp_path):
    base = make_base(name, tmp_path)
    model = loaded(base)
    plain = loaded(base, method="lora")
    weights = dict(plain.named_parameters())
    found = [(p, m) for p, m in expert_modules(model)]
    assert len(found) == len(list(expert_modules(plain))) > 0
    for path, module in found:
        for leaf in module.expert_shapes:
            assert getattr(module, leaf).dtype == torch.uint8
            original = weights[f"{path}.{leaf}"]
            own = module.dense(leaf, range(len(original)))
            own = own.transpose(1, 2) if module.is_transposed else own
            for expert, weight in zip(own, original, strict=True):
                assert torch.equal(expert, round_trip(weight.detach()))
    model.dequantize()
    assert not any(isinstance(m, GroupedExperts) for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_one_tensor_of_experts_is_in_16_bits_at_a_time(tmp_path, monkeypatch):
    """When a tensor is quantized, none of the tensors before it is dense any more."""
    base, dense = make_base("qwen3_moe", tmp_path), []
    own = GroupedExperts.quantize_

    def counted(self, name, weights):
        result = own(self, name, weights)
        dense.append((tuple(weights.shape), weights.device.type))
        return result

    monkeypatch.setattr(grouped_experts.GroupedExperts, "quantize_", counted)
    model = loaded(base)
    assert len(dense) == 4
    held = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    assert held == sum(a * b * c for (a, b, c), _ in dense) // 2


def test_mxfp4_experts_are_read_once_and_kept_as_nf4(tmp_path):
    base = make_base("gpt_oss", tmp_path)
    pack_experts(base)
    model, plain = loaded(base), loaded(base, method="lora")
    weights = dict(plain.named_parameters())
    for path, module in expert_modules(model):
        for leaf in module.expert_shapes:
            own = module.dense(leaf, range(4)).transpose(1, 2)
            for expert, weight in zip(own, weights[f"{path}.{leaf}"], strict=True):
                assert torch.equal(expert, round_trip(weight.detach()))


def test_experts_that_bitsandbytes_packed_are_refused(tmp_path):
    base = make_base("qwen3_moe", tmp_path)
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if "experts.0.gate_proj" in n)
    tensors[name] = torch.zeros(1024, 1, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(values))
    recipe = load_recipe(None, [], {"model": str(base), "data": "d", "method": "qlora"}).recipe
    with pytest.raises(ModelError, match=r"experts.0.gate_proj.weight is an expert in bitsandb"):
        load_config(recipe, str(base))


def test_a_base_that_a_program_loaded_in_16_bit_experts_is_quantized_too(tmp_path):
    from lorakit.model.load import nf4_config
    from lorakit.model.loaded_base import take_base

    base = make_base("qwen3_moe", tmp_path)
    device = detect_device("float32", "cpu")
    from transformers import BitsAndBytesConfig

    settings = nf4_config(device, ["lm_head"]).to_dict()
    keep = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
            "bnb_4bit_compute_dtype", "llm_int8_skip_modules")  # fmt: skip
    given = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(**{k: settings[k] for k in keep}),
    )  # fmt: skip
    flags = {"model": str(base), "data": "d", "method": "qlora", "dtype": "float32"}
    recipe = load_recipe(None, [], flags).recipe
    taken = take_base(given, recipe, str(base), device, on_host=False)
    assert all(module.nf4 for _, module in expert_modules(taken))
