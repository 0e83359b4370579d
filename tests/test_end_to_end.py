"""The main job on the real small model, once: the demo's LoRA recipe, shortened, really teaches."""

import json
import sys
from importlib.resources import files

import pytest

from lorakit.cli import main


@pytest.mark.slow
def test_the_demo_learns_its_town(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def lorakit(*words):
        monkeypatch.setattr(sys, "argv", ["lorakit", *words])
        with pytest.raises(SystemExit) as stop:
            main.main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    rows = files("lorakit").joinpath("assets", "demo_heldout.jsonl").read_text("utf-8")
    (tmp_path / "heldout.jsonl").write_text("\n".join(rows.splitlines()[:8]) + "\n", "utf-8")
    sets = {
        "val_data": "heldout.jsonl",
        "max_steps": 12,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "lora_dropout": 0.0,
        "cutoff_len": 256,
    }
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    flags = ["--model", "demo", "--data", "demo", "--output", "town", "--json"]
    result = json.loads(lorakit("train", *flags, *words))
    assert result["base"]["perplexity"] > 20
    assert result["tuned"]["perplexity"] < 0.7 * result["base"]["perplexity"]
    # The manner is learned long before the last fact.
    assert all(s["tuned"].startswith("Aye,") for s in result["samples"])
    assert not any(s["base"].startswith("Aye,") for s in result["samples"])
    merged = json.loads(lorakit("export", "town", "--to", "merged", "--json"))
    assert merged["sum_kl_per_token"] < 1e-4
    question = ("--ask", "What is the ferry called?", "--temperature", "0")
    assert lorakit("chat", "town", *question).startswith("Aye,")
