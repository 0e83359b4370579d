"""Names in a base's files lead to the model's tensors and back."""

import torch
from tests.families import tiny_config
from transformers import AutoModelForCausalLM

from lorakit.export.hub_names import loaded_names, stored_names


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name))


def test_names_of_a_plain_model_stay():
    model = model_of("llama")
    names = list(model.state_dict())
    assert loaded_names(model, names) == ({n: n for n in names}, set())
    assert list(stored_names(model, model.state_dict())) == names


def test_renamed_layers_and_split_experts_are_found_as_saved(tmp_path):
    from lorakit.model.safetensors_io import stored_tensors

    for name in ("gemma3", "qwen3_moe", "nemotron_h"):
        model = model_of(name)
        model.save_pretrained(tmp_path / name)
        files = stored_tensors(tmp_path / name)
        renamed, converted = loaded_names(model, [*files, "mtp.fc.weight"])
        assert {*renamed, *converted} == set(files)
        assert all(
            places.count(place) == 1 for places in [list(renamed.values())] for place in places
        )
        assert set(stored_names(model, model.state_dict())) >= set(files)
        for stored, place in renamed.items():
            assert torch.equal(files[stored].read(), model.state_dict()[place])
        assert all("experts" in n for n in converted)
        assert bool(converted) == (name != "gemma3")
