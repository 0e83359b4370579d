"""Runs of mixtures of experts end with their evaluation and report, not in their auxiliary loss."""

import json

import pytest
import torch
from tests.families import tiny_config
from transformers import AutoModelForCausalLM

from lorakit.api import finetune


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
