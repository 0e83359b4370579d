"""What surrounds a step: evaluation, generation, host, merge, disk."""

import json
from pathlib import Path

import pytest

from lorakit.model.shapes import shape_config
from lorakit.planning.cards import CARDS, card_device
from lorakit.planning.phases import disk_parts, host_parts, merge_parts, phases, spelled
from lorakit.planning.training import plan_training
from lorakit.recipe import Recipe

H100 = card_device(CARDS["h100"], None, "auto")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def recipe(**values):
    return Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})


@pytest.mark.parametrize("name", ["llama-2-7b", "smollm2-135m", "qwen3-30b-a3b", "gemma-7b"])
@pytest.mark.parametrize("values", [{}, {"method": "qlora"}, {"memory_limit": "5GiB"}])
def test_parts_are_spelled_out_and_keep_their_sum(name, values):
    asked, config = recipe(**values), shape_config(name)
    plan = plan_training(asked, config, H100)
    told = spelled(asked, config, H100, plan)
    assert sum(told.values()) == plan.total_bytes
    assert all(size > 0 for size in told.values())


def test_quantization_constants_are_an_eighth_of_a_bit_a_weight():
    asked, config = recipe(method="qlora"), shape_config("llama-2-7b")
    told = spelled(asked, config, H100, plan_training(asked, config, H100))
    bits = 8 * told["quantization constants"] / (2 * told["frozen weights (4-bit)"])
    assert bits == pytest.approx(0.127, abs=0.001)


def test_evaluation_and_generation_stand_on_the_same_weights():
    asked, config = recipe(), shape_config("llama-3.1-8b")
    plan = plan_training(asked, config, H100)
    found = phases(asked, config, H100, plan)
    for name in ("evaluation", "generation"):
        assert found[name]["frozen weights"] == plan.parts["frozen weights"]
    assert sum(found["evaluation"].values()) < plan.total_bytes
    # 4 answers of 2,144 tokens, 32 layers, keys and values of 8 heads of 128, 2 bytes each.
    assert found["generation"]["keys and values"] == 4 * 2144 * 32 * 2 * 8 * 128 * 2


def test_the_host_holds_what_is_streamed():
    config = shape_config("llama-2-7b")
    asked = recipe(streaming="on", memory_limit="4GiB")
    host = host_parts(asked, H100, plan_training(asked, config, H100))
    assert host["frozen weights"] == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert "frozen weights" not in host_parts(recipe(), H100, plan_training(recipe(), config, H100))


def test_merging_takes_what_was_measured():
    measured = json.loads((RESULTS / "export_memory_7b.json").read_text())["peak_rss_bytes"]
    parts = merge_parts(shape_config("llama-2-7b"))
    check = next(size for name, size in parts.items() if "--no-verify" in name)
    assert sum(parts.values()) - check == pytest.approx(measured, rel=0.15)


def test_disk():
    config = shape_config("llama-2-7b")
    parts = disk_parts(recipe(), config, local=False)
    assert parts["download (16-bit weights)"] == 2 * 6_738_415_616
    assert parts["adapter"] == 4 * 39_976_960
    assert disk_parts(recipe(), config, local=True)["download (16-bit weights)"] == 0
