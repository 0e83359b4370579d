"""What surrounds a step: evaluation, generation, host, merge, disk."""

import json
from pathlib import Path

import pytest
from tests.families import FAMILIES, tiny_config

from lorakit.model.param_counts import count
from lorakit.planning.gpus import GPUS, gpu_device, with_gpu_count
from lorakit.planning.known_models import shape_config
from lorakit.planning.memory import plan_memory
from lorakit.planning.planner import LIBRARIES_BYTES, plan_training
from lorakit.planning.stages import disk_parts, host_parts, merge_parts, phases, split_weight_parts
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

H100 = gpu_device(GPUS["h100"], None, "auto")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def recipe(**values):
    return Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})


@pytest.mark.parametrize("name", ["llama-2-7b", "smollm2-135m", "qwen3-30b-a3b", "gemma-7b"])
@pytest.mark.parametrize("values", [{}, {"method": "qlora"}, {"memory_limit": "5GiB"}])
def test_parts_are_spelled_out_and_keep_their_sum(name, values):
    asked, config = recipe(**values), shape_config(name)
    plan = plan_training(asked, config, H100)
    told = split_weight_parts(asked, config, H100, plan)
    assert sum(told.values()) == plan.total_bytes
    assert all(size > 0 for size in told.values())


def test_quantization_constants_are_an_eighth_of_a_bit_a_weight():
    asked, config = recipe(method="qlora"), shape_config("llama-2-7b")
    told = split_weight_parts(asked, config, H100, plan_training(asked, config, H100))
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


def test_what_does_not_come_and_go_is_in_every_phase():
    """QLoRA on two GPUs has all of it; evaluation comes while the optimizer is still there."""
    asked, config = recipe(method="qlora"), shape_config("llama-2-7b")
    device = with_gpu_count(H100, 2, None, None)
    plan = plan_training(asked, config, device)
    stays = {
        "frozen weights",
        "embeddings, head and norms",
        "adapters (float32)",
        "adapters (copy in the base's type)",
        "one layer dequantized",
        "CUDA context",
        "NCCL buffers",
    }
    found = phases(asked, config, device, plan)
    standing = {name: plan.parts[name] for name in stays}
    for name in ("evaluation", "generation"):
        assert {part: size for part, size in found[name].items() if part in stays} == standing
    state = plan.parts["optimizer state"]
    assert state > 0
    assert found["evaluation"]["optimizer state"] == state
    assert "optimizer state" not in found["generation"]
    for parts in found.values():
        assert "gradients (float32)" not in parts or parts is found["training"]


def test_on_a_cpu_python_stands_beside_every_phase():
    asked, config = recipe(), shape_config("smollm2-135m")
    cpu = Device("cpu", "CPU", 16 * 2**30, "float32")
    found = phases(asked, config, cpu, plan_training(asked, config, cpu))
    assert {parts["Python and libraries"] for parts in found.values()} == {LIBRARIES_BYTES}


def test_pages_of_a_paged_optimizer_lie_in_host_memory_of_each_process():
    config = shape_config("llama-2-7b")
    for ranks in (1, 2):
        device = with_gpu_count(H100, ranks, None, None)
        pages = {}
        for name in ("adamw_8bit", "paged_adamw_8bit"):
            asked = recipe(optimizer=name)
            parts = host_parts(asked, device, plan_training(asked, config, device))
            pages[name] = parts.get("optimizer pages", 0)
        assert pages == {"adamw_8bit": 0, "paged_adamw_8bit": ranks * 2 * 39_976_960}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("llama-2-7b", {}, {"embedding": 32000 * 4096, "head": 32000 * 4096}),
        ("llama-2-7b", {"memory_limit": "5GiB"}, {"head": 32000 * 4096}),
        ("smollm2-135m", {}, {"embedding, also the head": 49152 * 576}),
    ],
)
def test_embedding_and_head_are_told_apart(name, values, expected):
    asked, config = recipe(**values), shape_config(name)
    told = split_weight_parts(asked, config, H100, plan_training(asked, config, H100))
    found = {part: size for part, size in told.items() if "embedding" in part or part == "head"}
    assert found == {part: 2 * count for part, count in expected.items()}


def test_the_host_holds_what_is_streamed():
    config = shape_config("llama-2-7b")
    asked = recipe(weight_offload="on", memory_limit="4GiB")
    host = host_parts(asked, H100, plan_training(asked, config, H100))
    assert host["frozen weights"] == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert "frozen weights" not in host_parts(recipe(), H100, plan_training(recipe(), config, H100))


def test_merging_takes_what_was_measured():
    measured = json.loads((RESULTS / "export_memory_7b.json").read_text())["peak_rss_bytes"]
    parts = merge_parts(shape_config("llama-2-7b"))
    check = next(size for name, size in parts.items() if "check" in name)
    assert sum(parts.values()) - check == pytest.approx(measured, rel=0.15)
    assert check == 2 * 4 * 6_738_415_616  # two models in float32


def test_disk():
    config = shape_config("llama-2-7b")
    parts = disk_parts(recipe(), config, local=False)
    assert parts["download (16-bit weights)"] == 2 * 6_738_415_616
    assert parts["adapter"] == 4 * 39_976_960
    assert parts["merged export (16-bit)"] == 2 * 6_738_415_616
    assert disk_parts(recipe(), config, local=True)["download (16-bit weights)"] == 0


@pytest.mark.parametrize(("optimizer", "state"), [("adamw", 8), ("adamw_8bit", 2), ("sgd", 0)])
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_disk_holds_the_checkpoints_that_stay_and_the_one_being_written(keep, optimizer, state):
    asked = recipe(keep_checkpoints=keep, optimizer=optimizer)
    parts = disk_parts(asked, shape_config("llama-2-7b"), local=True)
    (checkpoints,) = (size for name, size in parts.items() if name.startswith("checkpoints"))
    assert checkpoints == (keep + 1) * (4 + state) * 39_976_960


def test_what_a_spread_base_takes_is_spelled_out_with_its_sum():
    asked, config = recipe(method="qlora", sharding="on"), shape_config("llama-2-7b")
    device = with_gpu_count(H100, 4, None, None)
    plan = plan_training(asked, config, device)
    told = split_weight_parts(asked, config, device, plan)
    assert sum(told.values()) == plan.total_bytes
    bits = 8 * told["quantization constants"] / (2 * told["frozen weights (4-bit)"])
    assert bits == pytest.approx(0.127, abs=0.001)
    for phase in ("evaluation", "generation"):
        assert "two layers, gathered" in phases(asked, config, device, plan)[phase]


def test_each_process_of_a_machine_has_host_memory_of_its_own():
    config, asked = shape_config("llama-2-7b"), recipe(weight_offload="on")
    one, four = (with_gpu_count(H100, n, None, None) for n in (1, 4))
    single = host_parts(asked, one, plan_training(asked, config, one))
    shared = host_parts(asked, four, plan_training(asked, config, four))
    for name in ("frozen weights", "embedding", "Python and libraries"):
        assert shared[name] == 4 * single[name]


def test_a_base_that_is_spread_is_loaded_whole_by_one_process_at_a_time():
    config, asked = shape_config("llama-2-7b"), recipe(sharding="on")
    device = with_gpu_count(H100, 4, None, None)
    parts = host_parts(asked, device, plan_training(asked, config, device))
    held = sum(parts.values()) - parts["Python and libraries"]
    assert held == pytest.approx(2 * 6_738_415_616, rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer_has_its_phases(name):
    config, asked = tiny_config(name), recipe()
    plan = plan_memory(asked, config, H100)
    found = phases(asked, config, H100, plan)
    layers = count(config).layers
    kept = 4 * (2048 + 96) * sum(layer.keys_values for layer in layers) * 2
    assert found["generation"]["keys and values"] == kept
    assert all(size >= 0 for parts in found.values() for size in parts.values())
