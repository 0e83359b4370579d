"""Runs of mixtures of experts end with their evaluation and report, not in their auxiliary loss."""

import json

import pytest
import torch
from rich.console import Console
from tests.families import tiny_config
from transformers import AutoModelForCausalLM

from lorakit.api import finetune
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "granitemoehybrid"])
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

    def recipe(name, steps):
        flags = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
        flags |= {"output_dir": str(tmp_path / name), "val_size": 0, "max_steps": steps}
        flags |= {"method": method, "expert_adapters": "all", "lora_dropout": 0.1, "offline": True}
        flags |= {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "save_every": 2}
        flags |= {"lr_scheduler": "constant", "router_aux_loss_coef": 0.01, "lora_r": 4}
        return load_recipe(None, [], flags)

    console = Console(quiet=True)
    fit(recipe("whole", 4), console)
    fit(recipe("part", 2), console)
    fit(load_recipe(tmp_path / "part" / "recipe.yaml", ["max_steps=4"]), console, resume=True)
    names = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "part")
    ]
    assert names[0].read_bytes() == names[1].read_bytes()
