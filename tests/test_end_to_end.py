"""The main job on the real small model, once: the demo's LoRA recipe, shortened, really teaches."""

import json
import sys

import pytest

from lorakit import cli


@pytest.mark.slow
def test_the_demo_learns_its_town(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["lorakit", "train", "--model", "demo", "--data", "demo", "--output", "town", "--json"]
    sets = {
        "val_data": "demo:heldout",
        "max_steps": 24,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "lora_dropout": 0.0,
        "cutoff_len": 256,
    }
    for key, value in sets.items():
        words += ["--set", f"{key}={value}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["base"]["perplexity"] > 20
    assert result["tuned"]["perplexity"] < 0.7 * result["base"]["perplexity"]
    # The manner is learned long before the last fact.
    assert all(s["tuned"].startswith("Aye,") for s in result["samples"])
    assert not any(s["base"].startswith("Aye,") for s in result["samples"])
    monkeypatch.setattr(sys, "argv", ["lorakit", "export", "town", "--to", "merged", "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["kl_per_token"] < 5e-3
    asking = ["lorakit", "chat", "town", "--ask", "What is the ferry called?", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", asking)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("Aye,")
