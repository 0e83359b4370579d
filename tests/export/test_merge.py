"""What is merged is what was trained, in every variant peft offers, as read back from the disk."""

import json

import pytest
import torch

from lorakit.data.items import read_validation
from lorakit.errors import RunError, WorkError
from lorakit.export import merge
from lorakit.export.merge import export_merged

VARIANTS = {
    "lora": {},
    "qlora": {"method": "qlora"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8.0}},
    "bias": {"bias": "lora_only"},
    "float32": {"dtype": "float32"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_adapter(finish, tmp_path, variant):
    run = finish(**VARIANTS[variant]).run
    target = tmp_path / "merged"
    check = export_merged(run, target, read_validation(run.validation))
    assert check.kl_per_token < (1e-7 if variant == "float32" else 1e-3)
    assert check.top1_agreement > (0.999 if variant == "float32" else 0.9)
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"]
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in tokenizer["chat_template"]
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2
    assert oct((target / "model.safetensors").stat().st_mode)[-3:] == "644"


def test_the_merge_really_holds_the_update(finish, tmp_path, tiny_model_dir):
    """A merge that silently kept the base would pass a check against itself."""
    from safetensors.torch import load_file

    run = finish(dtype="float32").run
    export_merged(run, tmp_path / "m", [])
    merged = load_file(tmp_path / "m" / "model.safetensors")
    base = load_file(tiny_model_dir / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    delta = 2.0 * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(merged[name], base[name] + delta, rtol=1e-5, atol=1e-6)


def test_an_existing_target_is_refused(finish, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(RunError, match="exists already"):
        export_merged(finish().run, tmp_path / "m", [])


def test_a_merge_that_differs_is_not_written(finish, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "LARGEST_KL", -1.0)
    with pytest.raises(WorkError, match="differs from the adapter"):
        export_merged(finish().run, tmp_path / "m", [])
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_said_before_writing(finish, tmp_path, monkeypatch):
    usage = type("U", (), {"free": 1000})
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WorkError, match="are free"):
        export_merged(finish().run, tmp_path / "m", [])
    assert list(tmp_path.iterdir()) == []
