"""The plan counts exactly what can be counted, from a config alone."""

import json
from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.memory import budget_of, plan_memory, plan_of
from lorakit.model.shapes import shape_config
from lorakit.model.sizes import NF4_BYTES
from lorakit.recipe import Recipe
from lorakit.records import Device, Placement

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
    for engine, key in (
        ("off", "activations (estimate)"),
        ("auto", "activations kept for backward"),
    ):
        kept = plan_memory(recipe(engine=engine), config, H100)
        again = plan_memory(recipe(engine=engine, gradient_checkpointing=True), config, H100)
        assert again.parts[key] < kept.parts[key] / 5
        assert set(kept.keep) == {0}
        assert set(again.keep) == {3}


@pytest.mark.parametrize("limit", [15, 15.2, 16, 17, 18, 19, 30])
def test_auto_fills_the_limit_and_recomputes_no_more_than_it_must(limit):
    config = shape_config("llama-2-7b")
    asked = recipe(gradient_checkpointing="auto", memory_limit=f"{limit}GiB")
    plan = plan_memory(asked, config, H100)
    assert plan.fits
    assert plan.total_bytes <= budget_of(asked, H100) < limit * 2**30
    if limit == 30:
        assert plan.describe() == "nothing recomputed"
    elif limit > 15.2:  # what is left over is less than one layer's next larger tensor
        assert plan.total_bytes > budget_of(asked, H100) - 0.2 * 2**30


def test_the_embedding_goes_to_the_host_last():
    config = shape_config("llama-2-7b")
    asked = recipe(gradient_checkpointing="auto", memory_limit="15GiB")
    plan = plan_memory(asked, config, H100)
    assert plan.placement.embedding_on_host
    assert not plan.placement.layer_major
    assert plan.fits
    assert "host memory" in plan.describe()


@pytest.mark.parametrize(("method", "smallest"), [("lora", 3.0), ("qlora", 2.4)])
def test_below_that_layers_take_the_whole_step_one_by_one(method, smallest):
    """Less on the card at each notch, never more than the limit, until nothing is left to move."""
    config = shape_config("llama-2-7b")
    moved = 0
    for limit in (8.0, 6.0, 5.0, 4.0, smallest):
        asked = Recipe(
            model="m", data="d", method=method, target_modules=TARGETS, memory_limit=f"{limit}GiB"
        )
        plan = plan_memory(asked, config, H100)
        assert plan.fits, limit
        assert plan.total_bytes <= limit * 2**30
        assert plan.placement.layer_major
        assert "layer by layer" in plan.describe()
        here = len(plan.placement.in_words(len(plan.keep)))
        assert here >= moved
        moved = here
        assert plan.host_bytes > 0
    assert plan.placement.base_on_host
    assert not plan_memory(asked.model_copy(update={"memory_limit": "2GiB"}), config, H100).fits


def test_streaming_is_had_on_request_and_kept_away_on_request():
    config = shape_config("llama-2-7b")
    asked = recipe(gradient_checkpointing="auto", streaming="on")
    plan = plan_memory(asked, config, H100)
    assert plan.placement.base_on_host
    # A card with room to spare keeps every layer's inputs.
    assert plan.placement.inputs_on_card == 32
    for changes in ({"use_dora": True}, {"engine": "off"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(RecipeError, match="streaming: on needs the fast layers"):
            plan_memory(recipe(streaming="on", **changes), config, H100)
    on_cpu = Device("cpu", "x", 64 * 2**30, "float32", "sdpa")
    assert plan_memory(recipe(streaming="on"), config, on_cpu).placement.base_on_host
    never = recipe(gradient_checkpointing="auto", streaming="off", memory_limit="9GiB")
    assert not plan_memory(never, config, H100).fits
    # bitsandbytes' optimizers know no host.
    eight = recipe(gradient_checkpointing="auto", optimizer="adamw_8bit", memory_limit="3.2GiB")
    assert not plan_memory(eight, config, H100).placement.adapters_on_host
    # Modules trained in full have no place in this order of work.
    full = recipe(gradient_checkpointing="auto", modules_to_save=["lm_head"], memory_limit="9GiB")
    assert not plan_memory(full, config, H100).placement.layer_major


@pytest.mark.parametrize("path", sorted(RESULTS.glob("memory_*.json")), ids=lambda p: p.stem)
def test_runs_within_a_budget_stay_within_it_and_near_the_plan(path):
    row = json.loads(path.read_text())
    recipe = Recipe(**{**row["recipe"], "model": "m", "data": "d"})
    config, placement = shape_config(row["shape"]), Placement(**row["placement"])
    measured = row["peak_process_gib"] * 2**30
    assert measured <= recipe.memory_limit_bytes
    plan = plan_of(recipe, config, H100, row["keep"], placement)
    assert plan.total_bytes == pytest.approx(measured, rel=0.10)


def ranks(count, nodes=1, gib=80, kind="cuda"):
    return Device(kind, "x", gib * 2**30, "bfloat16", "sdpa", ranks=count, nodes=nodes)


def auto(method="lora", **changes):
    return recipe(method, gradient_checkpointing="auto", **changes)


def test_several_gpus_hold_what_one_holds_and_what_joins_them():
    config = shape_config("llama-2-7b")
    one, two = (plan_memory(auto(), config, device) for device in (H100, ranks(2)))
    assert set(two.parts) - set(one.parts) == {"NCCL buffers"}
    assert {name: two.parts[name] for name in one.parts} == one.parts
    assert two.placement == one.placement


def test_a_micro_batch_is_no_larger_than_a_ranks_part_of_the_step():
    config = shape_config("llama-2-7b")
    asked = recipe(micro_batch_size=4, gradient_accumulation_steps=2)
    kept = "activations kept for backward"
    for count, rows in ((2, 4), (3, 3), (4, 2), (8, 1), (32, 1)):
        shared = plan_memory(asked, config, ranks(count)).parts[kept]
        single = recipe(micro_batch_size=rows, gradient_accumulation_steps=1)
        assert shared == plan_memory(single, config, H100).parts[kept], count
    streamed = asked.model_copy(update={"streaming": "on"})
    whole, part = (plan_memory(streamed, config, d).parts for d in (H100, ranks(4)))
    assert part["hidden states of a step"] * 4 == whole["hidden states of a step"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_too_large_for_one_gpu_is_spread_over_those_of_a_node(method):
    """Before anything goes to host memory but inputs and the embedding."""
    config = shape_config("llama-3.3-70b")
    gib = 79 if method == "lora" else 24
    plan = plan_memory(auto(method), config, ranks(16, nodes=2, gib=gib))
    assert plan.fits
    assert plan.placement.layer_major
    assert plan.placement.shards == 8
    assert not plan.placement.base_on_host
    assert "each layer's weights spread over 8 GPUs" in plan.describe()
    linear = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    whole = linear * (2 if method == "lora" else NF4_BYTES)
    assert plan.parts["frozen weights"] == pytest.approx(whole / 8, rel=1e-6)
    assert plan.parts["two layers, gathered"] == pytest.approx(whole / 40, rel=1e-6)
    alone = plan_memory(auto(method), config, ranks(1, gib=gib))
    assert alone.placement.base_on_host
    one_a_node = plan_memory(auto(method), config, ranks(16, nodes=16, gib=gib))
    assert one_a_node.placement.base_on_host


def test_sharding_is_had_on_request_and_kept_away_on_request():
    config = shape_config("llama-2-7b")
    for checkpointing in ("auto", True, False):
        asked = recipe(sharding="on", gradient_checkpointing=checkpointing)
        assert plan_memory(asked, config, ranks(4)).placement.shards == 4
    on_cpu = plan_memory(recipe(sharding="on"), config, ranks(2, gib=64, kind="cpu"))
    assert on_cpu.placement.shards == 2
    assert "NCCL buffers" not in on_cpu.parts
    never = auto(sharding="off", memory_limit="8GiB")
    assert plan_memory(never, config, ranks(2)).placement.base_on_host
    spread = plan_memory(auto(streaming="off", memory_limit="10GiB"), config, ranks(2))
    assert (spread.fits, spread.placement.shards) == (True, 2)
    assert not plan_memory(never.model_copy(update={"streaming": "off"}), config, ranks(2)).fits
    full = auto(modules_to_save=["lm_head"], memory_limit="9GiB")
    assert plan_memory(full, config, ranks(2)).placement.shards == 1


def test_processes_on_a_cpu_share_its_memory():
    config = shape_config("tiny")
    plan = plan_memory(recipe(engine="on"), config, ranks(4, gib=8, kind="cpu"))
    assert plan.available_bytes == 2 * 2**30
    apart = plan_memory(recipe(engine="on"), config, ranks(4, nodes=4, gib=8, kind="cpu"))
    assert apart.available_bytes == 8 * 2**30
