"""The example with its loop in sight computes what `lorakit train` computes."""

import importlib.util
import json
from pathlib import Path

import pytest

import lorakit

PATH = Path(__file__).parents[1] / "examples" / "minimal_sft.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("minimal_sft", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_has_the_losses_of_a_run(example, tiny_model_dir, tmp_path, capsys):
    """All rows in each step, so that the order of rows is not compared."""
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tiny_model_dir), "--data", str(data), "--batch-size", "6"]
    words += ["--epochs", "4", "--learning-rate", "1e-2", "--cutoff-len", "256"]
    losses = example.main([*words, "--output", str(tmp_path / "adapter")])
    run = lorakit.finetune(
        model=str(tiny_model_dir), data=str(data), output_dir=str(tmp_path / "run"), epochs=4,
        micro_batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-2, lora_dropout=0.0,
        cutoff_len=256, val_size=0, log_every=1, packing=False, dtype="float32",
    )  # fmt: skip
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    ours = [row["loss"] for row in logged if "loss" in row]
    assert ours == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_example_stays_short():
    assert len(PATH.read_text().splitlines()) <= 150
