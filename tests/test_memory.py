"""The plan counts exactly what can be counted, from a config alone."""

import json
from pathlib import Path

import pytest

from lorakit.memory import NF4_BYTES, plan_memory
from lorakit.model.random_weights import shape_config
from lorakit.recipe import Recipe
from lorakit.records import Device

H100 = Device("cuda", "H100", 80 * 2**30, "bfloat16", "sdpa")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def recipe(method="lora", **changes):
    values = {"model": "m", "data": "d", "target_modules": TARGETS, "method": method}
    return Recipe(**values, gradient_checkpointing=False).model_copy(update=changes)


def test_llama_2_7b_weights_are_counted_to_the_byte():
    plan = plan_memory(recipe(), shape_config("llama-2-7b"), H100)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plan.parts["frozen weights"] == 2 * linear
    other = 2 * 32000 * 4096 + 65 * 4096  # embedding, head, norms
    assert plan.parts["embeddings, head and norms"] == 2 * other
    adapters = 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))
    assert plan.parts["adapters (float32)"] == 4 * adapters == 4 * 39_976_960
    assert plan.parts["optimizer state"] == 8 * adapters


def test_nf4_takes_about_a_quarter_of_bf16():
    lora = plan_memory(recipe(), shape_config("llama-2-7b"), H100).parts["frozen weights"]
    qlora = plan_memory(recipe("qlora"), shape_config("llama-2-7b"), H100).parts["frozen weights"]
    assert qlora / lora == pytest.approx(NF4_BYTES / 2, rel=1e-6)
    assert qlora == pytest.approx(3.341e9, rel=1e-3)


def test_tied_embeddings_are_counted_once_and_small_cards_are_refused():
    small = Device("cuda", "small", 2**30, "bfloat16", "sdpa")
    plan = plan_memory(recipe(), shape_config("smollm2-135m"), small)
    weights = plan.parts["frozen weights"] + plan.parts["embeddings, head and norms"]
    assert weights == 2 * 134_515_008
    assert not plan_memory(recipe(), shape_config("llama-2-7b"), small).fits


def test_recomputation_saves_activations():
    config = shape_config("llama-2-7b")
    kept = plan_memory(recipe(), config, H100)
    again = plan_memory(recipe(gradient_checkpointing=True), config, H100)
    key = "activations (estimate)"
    assert again.parts[key] < kept.parts[key] / 5


@pytest.mark.parametrize("path", sorted(RESULTS.glob("baseline_*.json")), ids=lambda p: p.stem)
def test_measured_peaks_are_near_the_plan(path):
    row = json.loads(path.read_text())
    values = {**row["recipe"], "model": "m", "data": "d"}
    plan = plan_memory(Recipe(**values), shape_config(row["shape"]), H100)
    measured = row["peak_process_gib"] * 2**30
    assert plan.total_bytes == pytest.approx(measured, rel=0.10)
