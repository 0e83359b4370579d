"""Changes are planned, not guessed: what is said to fit fits, and saves what it says."""

from dataclasses import replace
from functools import cache

import pytest

from lorakit.planning.gpus import GPUS, gpu_device
from lorakit.planning.known_models import shape_config
from lorakit.planning.planner import plan_training
from lorakit.planning.suggestions import _with, fewest_gpus, find_changes, smallest_gpu
from lorakit.planning.throughput import expected_speed
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe

CASES = [
    ("llama-2-7b", "t4", {"weight_offload": "off"}),
    ("llama-3.1-8b", "3060", {"weight_offload": "off"}),
    ("llama-2-7b", "4090", {"gradient_checkpointing": False, "micro_batch_size": 8}),
    ("qwen3-8b", "4080", {"weight_offload": "off", "method": "qlora", "cutoff_len": 16384}),
    ("llama-2-7b", "t4", {"fused_layers": "off"}),
]


def recipe(**values):
    return Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})


@cache
def changes(case):
    name, card, values = CASES[case]
    asked, config = recipe(**values), shape_config(name)
    device = gpu_device(GPUS[card], None, "auto")
    plan = plan_training(asked, config, device)
    return asked, config, device, plan, find_changes(asked, config, device, plan, GPUS[card])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_offered_fits_and_is_what_it_says(case):
    asked, config, device, plan, found = changes(case)
    assert not plan.fits
    assert found
    for change in found:
        again = plan_training(_with(asked, change.settings), config, device)
        assert change.fits
        assert again.fits
        assert again.total_bytes == change.total_bytes == plan.total_bytes - change.saved_bytes
        typed, card = _with(asked, change.settings), GPUS[CASES[case][1]]
        before, after = (
            expected_speed(*one, card).tokens_per_second
            for one in ((asked, config, device, plan), (typed, config, device, again))
        )
        assert change.slower == pytest.approx(1 - after / before)
        assert change.as_dict()["slower"] == round(change.slower, 3)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_flags_are_settings_that_the_command_line_takes(case):
    asked, _, _, _, found = changes(case)
    given = {"model": "m", "data": "d", "target_modules": "all-linear", **CASES[case][2]}
    for change in found:
        overrides = [pair.strip() for pair in change.flags.split("--set ") if pair]
        kept = {key: value for key, value in given.items() if key not in change.settings}
        typed = load_recipe(None, overrides, kept).recipe
        assert typed.model_dump() == _with(asked, change.settings).model_dump()


def test_the_same_result_comes_before_another():
    _, _, _, _, found = changes(2)
    same = [c.cost.startswith("the same result") for c in found]
    assert same == sorted(same, reverse=True)
    assert found[0].settings == {"gradient_checkpointing": "auto"}
    for change in found:
        if set(change.settings) == {"micro_batch_size", "gradient_accumulation_steps"}:
            product = change.settings["micro_batch_size"]
            product *= change.settings["gradient_accumulation_steps"]
            assert product == 8 * 8


def test_qlora_is_offered_with_no_more_rows_than_now():
    _, _, _, _, found = changes(1)
    four_bits = next(c for c in found if "method" in c.settings)
    assert four_bits.settings["micro_batch_size"] == 1


def test_the_nearest_is_given_where_nothing_fits():
    asked, config = recipe(), shape_config("qwen3-30b-a3b")
    device = gpu_device(None, 3 * 2**30, "auto")
    plan = plan_training(asked, config, device)
    found = find_changes(asked, config, device, plan, None)
    assert len(found) == 1
    assert not found[0].fits
    assert found[0].saved_bytes > 0
    assert found[0].slower is None


def test_the_smallest_gpu():
    one = gpu_device(GPUS["t4"], None, "auto")
    tight = recipe(weight_offload="off")
    assert smallest_gpu(tight, shape_config("llama-3.1-8b"), one).name == "l4"
    assert smallest_gpu(recipe(), shape_config("smollm2-135m"), one).memory_gib < 12
    two = smallest_gpu(tight, shape_config("llama-3.1-8b"), replace(one, ranks=2))
    assert two.memory_gib < GPUS["l4"].memory_gib
    # One in each of two machines cannot share the base.
    apart = smallest_gpu(tight, shape_config("llama-3.1-8b"), replace(one, ranks=2, nodes=2))
    assert apart.name == "l4"


def test_sharding_is_offered_where_it_was_forbidden():
    asked = recipe(weight_offload="off", sharding="off")
    device = replace(gpu_device(GPUS["t4"], None, "auto"), ranks=2)
    config = shape_config("llama-2-7b")
    found = find_changes(asked, config, device, plan_training(asked, config, device), GPUS["t4"])
    assert {"sharding": "auto"} in [change.settings for change in found]


def test_more_gpus_are_counted():
    asked, config = recipe(weight_offload="off"), shape_config("llama-2-13b")
    one = gpu_device(GPUS["4080"], None, "auto")
    assert not plan_training(asked, config, one).fits
    count = fewest_gpus(asked, config, one)
    assert plan_training(asked, config, replace(one, ranks=count)).fits
    assert not plan_training(asked, config, replace(one, ranks=count // 2)).fits
    apart = recipe(weight_offload="off", sharding="off")
    assert fewest_gpus(apart, config, one) is None
