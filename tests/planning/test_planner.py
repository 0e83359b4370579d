"""A plan of the whole process: what a CPU run really took, and the budget it is held to."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.planning.known_models import shape_config
from lorakit.planning.planner import LIBRARIES_BYTES, longest_rows, plan_for_data, plan_training
from lorakit.planning.rank_workload import NF4_BYTES
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_accuracy.py"
RESULTS = SCRIPT.parent / "results"
CPU = Device("cpu", "CPU", 16 * 2**30, "float32")
CARD = Device("cuda", "card", 24 * 2**30, "bfloat16")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def recipe(**values):
    return Recipe(**{"model": "m", "data": "d", "target_modules": TARGETS, **values})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
def test_a_real_process_takes_what_was_planned():
    """The same code as the benchmark, its first two rows that train more than a toy."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--row", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["measured_gib"] > 1
    assert abs(row["error"]) < 0.15, row


@pytest.mark.parametrize("path", sorted(RESULTS.glob("plan_*.json")), ids=lambda p: p.stem)
def test_committed_figures_hold_the_promise(path):
    value = json.loads(path.read_text())
    rows = [row for row in value["rows"] if "error" in row]
    assert len(rows) >= 4
    assert value["median_error"] <= 0.05
    assert value["worst_error"] <= 0.10


def test_a_cpu_run_counts_python_and_recomputes_only_where_it_must():
    config = shape_config("smollm2-135m")
    kept = plan_training(recipe(), config, CPU)
    assert kept.parts["Python and libraries"] == LIBRARIES_BYTES
    assert kept.fits
    assert set(kept.keep) == {0}
    small = plan_training(recipe(memory_limit="4GiB"), config, CPU)
    assert set(small.keep) == {3}
    assert small.describe() == "all recomputed in 30 layers"
    assert small.total_bytes < kept.total_bytes
    assert not plan_training(recipe(memory_limit="1GiB"), config, CPU).fits
    asked = plan_training(recipe(gradient_checkpointing=False, memory_limit="4GiB"), config, CPU)
    assert not asked.fits


def test_a_cpu_run_with_the_engine_counts_python_too():
    plan = plan_training(recipe(fused_layers="on"), shape_config("tiny"), CPU)
    assert plan.parts["Python and libraries"] == LIBRARIES_BYTES


def test_models_without_fast_layers_are_counted_on_a_card():
    asked = recipe(target_modules=["q_proj", "v_proj"], weight_offload="off")
    plan = plan_training(asked, shape_config("qwen3-30b-a3b"), CARD)
    assert "activations (estimate)" not in plan.parts
    assert plan.parts["experts (not quantized)"] == 2 * 48 * EXPERTS_OF_A_LAYER
    assert "Python and libraries" not in plan.parts


EXPERTS_OF_A_LAYER = 128 * 3 * 2048 * 768


def test_experts_are_in_4_bits_or_streamed_where_the_card_cannot_hold_them():
    asked = recipe(
        method="qlora", target_modules=["q_proj"], micro_batch_size=1, memory_limit="24GiB"
    )
    config = shape_config("qwen3-30b-a3b")
    held = plan_training(asked, config, CARD)
    packed = int(48 * EXPERTS_OF_A_LAYER * NF4_BYTES)
    assert held.fits
    assert held.parts["experts (NF4)"] == packed
    assert not held.placement.loaded_on_host
    small = plan_training(asked.model_copy(update={"memory_limit": "12GiB"}), config, CARD)
    assert small.fits
    assert small.placement.experts_on_host
    assert small.placement.loaded_on_host
    assert small.parts["experts of two layers"] == pytest.approx(packed / 24, abs=2)
    assert small.host_parts == {"experts": packed}
    assert all(small.keep)
    assert "in host memory: experts" in small.describe()
    asked_for = asked.model_copy(update={"weight_offload": "on"})
    assert plan_training(asked_for, config, CARD).placement.experts_on_host


def test_adapters_of_all_experts_are_planned():
    asked = recipe(method="qlora", target_modules=["q_proj"], expert_adapters="all", lora_r=16)
    plan = plan_training(asked, shape_config("qwen3-30b-a3b"), CARD)
    each = 16 * 128 * ((2048 + 1536) + (768 + 2048))
    attention = 16 * (2048 + 32 * 128)
    assert plan.parts["adapters (float32)"] == 4 * 48 * (each + attention)


OLD_CARD = replace(CARD, dtype="float16", kernels=False)


def test_a_card_without_kernels_is_planned_with_the_models_own_layers():
    asked = recipe(method="qlora", micro_batch_size=2)
    config = shape_config("llama-2-7b")
    plan = plan_training(asked, config, OLD_CARD)
    assert plan == plan_training(asked.model_copy(update={"fused_layers": "off"}), config, OLD_CARD)
    assert "adapters (copy in the base's type)" in plan_training(asked, config, CARD).parts
    on = plan_training(asked.model_copy(update={"fused_layers": "on"}), config, OLD_CARD)
    assert "adapters (copy in the base's type)" in on.parts


def test_what_its_own_layers_cannot_hold_is_streamed_there_too():
    small = replace(OLD_CARD, memory_bytes=12 * 2**30)
    plan = plan_training(recipe(), shape_config("llama-2-7b"), small)
    assert plan.fits
    assert plan.placement.base_on_host
    for closed in ({"weight_offload": "off"}, {"use_dora": True}):
        assert not plan_training(recipe(**closed), shape_config("llama-2-7b"), small).fits


def test_short_data_makes_short_rows():
    asked = recipe(cutoff_len=2048, gradient_accumulation_steps=4)
    assert longest_rows(asked, 100, CPU).cutoff_len == 400
    assert longest_rows(asked.model_copy(update={"packing": False}), 100, CPU).cutoff_len == 100
    assert longest_rows(asked, 1000, CPU).cutoff_len == 2048
    assert longest_rows(asked, 1, CPU).cutoff_len == 8  # the least that a recipe may have
    assert longest_rows(asked, 0, CPU) == asked


def test_on_a_card_rows_are_as_long_as_cuda_graphs_make_them():
    asked = recipe(cutoff_len=2048, gradient_accumulation_steps=4)
    assert longest_rows(asked, 96, CARD).cutoff_len == 384
    assert longest_rows(asked, 97, CARD).cutoff_len == 512
    assert longest_rows(asked, 512, CARD).cutoff_len == 2048


def test_short_data_needs_nothing_recomputed_where_full_rows_would():
    asked = recipe(method="qlora", lora_r=64, micro_batch_size=4, gradient_accumulation_steps=4)
    config = shape_config("llama-2-7b")
    card = replace(CARD, memory_bytes=int(14.6 * 2**30), dtype="float16")
    full = plan_training(asked, config, card)
    assert full.fits
    assert max(full.keep) > 0
    rows, plan = plan_for_data(asked, config, card, 70)
    assert rows.cutoff_len == 384
    assert set(plan.keep) == {0}
    assert plan_for_data(asked, config, card, 2048) == (asked, full)


def test_a_run_layer_by_layer_is_planned_with_full_rows():
    config = shape_config("llama-2-7b")
    card = replace(CARD, memory_bytes=int(14.6 * 2**30), dtype="float16")
    asked = recipe(gradient_accumulation_steps=8)
    assert plan_for_data(asked, config, card, 50) == (asked, plan_training(asked, config, card))


def test_processes_share_rows_cores_and_memory():
    config = shape_config("smollm2-135m")
    asked = recipe(micro_batch_size=4, gradient_accumulation_steps=1, gradient_checkpointing=False)
    kept = "activations kept for backward"
    two = plan_training(asked, config, replace(CPU, ranks=2))
    half = plan_training(asked.model_copy(update={"micro_batch_size": 2}), config, CPU)
    assert two.parts[kept] == half.parts[kept]
    assert two.available_bytes == CPU.memory_bytes // 2
    many = recipe(gradient_accumulation_steps=8)
    assert longest_rows(many, 100, replace(CPU, ranks=4)).cutoff_len == 200


def test_sharding_on_a_cpu_is_planned_where_it_is_asked_for():
    asked = recipe(sharding="on")
    plan = plan_training(asked, shape_config("tiny"), replace(CPU, ranks=2))
    assert plan.placement.shards == 2
    assert plan.fits
    assert plan.parts["Python and libraries"] == LIBRARIES_BYTES
    tight = asked.model_copy(update={"memory_limit": "500MB"})
    assert not plan_training(tight, shape_config("tiny"), replace(CPU, ranks=2)).fits
    with pytest.raises(RecipeError, match="sharding: on needs the fast layers"):
        plan_training(asked, shape_config("gemma-2-9b"), replace(CPU, ranks=2))


def test_a_pair_is_planned_as_two_sequences():
    pairs = recipe(objective="dpo", micro_batch_size=2, lora_dropout=0.05)
    rows = recipe(micro_batch_size=4)
    for device in (CPU, CARD):
        assert plan_training(pairs, shape_config("tiny"), device) == plan_training(
            rows, shape_config("tiny"), device
        )
