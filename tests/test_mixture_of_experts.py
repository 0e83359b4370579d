"""Runs of mixtures of experts end with their evaluation and report, not in their auxiliary loss."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from tests.families import tiny_config
from transformers import AutoModelForCausalLM

from lorakit.api import finetune
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir


# Qwen3-Next has the layers of qwen3_5_moe, without a wrapper around them.
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe", "granitemoehybrid"])
def test_a_run_with_held_out_rows_is_evaluated(name, tokenizer, tmp_path):
    config = tiny_config(name, vocab_size=len(tokenizer))
    config.get_text_config().output_router_logits = True  # as some published configs have it
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = finetune(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        val_size=3,
        max_steps=1,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
    )
    found = json.loads((run.path / "eval.json").read_text())
    assert found["tuned"]["tokens"] > 0
    assert len(found["samples"]) == 3
    assert (run.path / "report.html").exists()
    saved = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_run_with_adapted_experts_has_the_same_bytes(method, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = tiny_config("qwen3_moe", vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    flags = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
    flags |= {"output_dir": str(tmp_path / "whole"), "val_size": 0, "max_steps": 4}
    flags |= {"method": method, "expert_adapters": "all", "lora_dropout": 0.1, "offline": True}
    flags |= {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "save_every": 2}
    flags |= {"lr_scheduler": "constant", "router_aux_loss_coef": 0.01, "lora_r": 4}
    console = Console(quiet=True)
    whole = fit(load_recipe(None, [], flags), console).run
    part = RunDir(tmp_path / "part")
    shutil.copytree(whole.path, part.path)
    shutil.rmtree(part.checkpoint(4))
    shutil.rmtree(part.adapter)
    assert fit(load_recipe(part.recipe), console, resume=True).steps == 4
    files = [run.adapter / "adapter_model.safetensors" for run in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
