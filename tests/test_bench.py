"""A bench row carries what a reader needs to repeat it, for both methods, without a download."""

import json

import pytest
import torch
from rich.console import Console
from tests.families import tiny_config

from lorakit import bench
from lorakit.bench import run_bench

NEEDED = {
    "id",
    "gpu",
    "shape",
    "method",
    "tokens_per_second",
    "peak_allocated_gib",
    "peak_process_gib",
    "versions",
    "commit",
    "date",
    "command",
}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_row_is_complete_json(method):
    row = run_bench("tiny", method, 32, 2, 2, 3, [], "x", Console(quiet=True))
    assert set(row) >= NEEDED
    assert json.loads(json.dumps(row)) == row
    assert row["tokens_per_step"] == 2 * 2 * 32
    assert len(row["step_seconds"]) == 3
    assert row["tokens_per_second"] > 0
    assert row["recipe"]["micro_batch_size"] == 2
    if not torch.cuda.is_available():  # on a card other tests of this process hold memory already
        assert row["peak_process_gib"] > 0.05
    assert "--output" not in row["command"]


@pytest.mark.parametrize(("family", "method"), [("gemma4", "qlora"), ("mistral3", "lora")])
def test_layers_that_share_keys_and_models_with_towers_are_measured(family, method, monkeypatch):
    monkeypatch.setattr(bench, "shape_config", lambda _: tiny_config(family))
    row = run_bench("tiny", method, 32, 1, 2, 4, [], None, Console(quiet=True))
    assert row["tokens_per_second"] > 0
    assert row["trainable_parameters"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_gpu_runs_both_types_with_paged_optimizer_and_recomputation(method, dtype):
    """float16 is what a T4 gets: with loss scaling, and adapters in float32."""
    sets = [f"dtype={dtype}", "optimizer=paged_adamw_8bit", "gradient_checkpointing=true"]
    row = run_bench("tiny", method, 64, 2, 2, 4, sets, None, Console(quiet=True))
    assert row["tokens_per_second"] > 0
    assert row["peak_allocated_gib"] > 0
