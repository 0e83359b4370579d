"""What several GPUs make of a step: where the base lies and why, who waits, what is gained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.errors import WorkError
from lorakit.planning.forecast import forecast
from lorakit.planning.gpus import GPUS, gpu_device, with_gpu_count
from lorakit.planning.known_models import shape_config
from lorakit.planning.multi_gpu import describe_split, idle_share, shared_device
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def found(shape="llama-2-7b", card="h100", gpus=1, nodes=1, network=None, **values):
    recipe = Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})
    device = with_gpu_count(gpu_device(GPUS[card], None, recipe.dtype), gpus, nodes, network)
    return forecast(recipe, shape_config(shape), device, GPUS[card])


def test_one_gpu_has_no_scale():
    value = found()
    assert value.scale is None
    assert value.as_dict()["scale"] is None


@pytest.mark.parametrize(
    ("examples", "ranks", "said"),
    [
        (8, 4, "8 examples a step over 4 GPUs: 2 each"),
        (8, 3, "8 examples a step over 3 GPUs: 3 on 2 of them, the rest does 2 and waits"),
        (9, 4, "9 examples a step over 4 GPUs: 3 on 1 of them, the rest does 2 and waits"),
        (8, 32, "8 examples a step over 32 GPUs: 1 on 8 of them, the rest has nothing to do"),
        (1, 2, "1 example a step over 2 GPUs: 1 on 1 of them, the rest has nothing to do"),
    ],
)
def test_the_split_is_told(examples, ranks, said):
    assert describe_split(examples, Device("cuda", "x", 1, "bfloat16", ranks=ranks)) == said


def test_idle_time():
    assert idle_share(8, 4) == 0
    assert idle_share(8, 3) == pytest.approx(1 / 9)
    assert idle_share(8, 32) == pytest.approx(3 / 4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_gain_of_two_gpus_is_what_was_measured(method):
    one, two = (
        json.loads((RESULTS / f"scale_{method}-{count}.json").read_text()) for count in (1, 2)
    )
    measured = two["tokens_per_second"] / one["tokens_per_second"]
    assert 2 * found(gpus=2, method=method).scale.efficiency == pytest.approx(measured, abs=0.05)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_two_gpus_gain_almost_twice(method):
    value = found(gpus=2, method=method)
    assert 0.95 < value.scale.efficiency <= 1
    single = found(method=method).speed.tokens_per_second
    assert value.speed.tokens_per_second == pytest.approx(2 * single * value.scale.efficiency)
    assert value.scale.one_gpu == single
    assert 0 < value.scale.waited_share < 0.05
    assert "in full (as DDP): it fits one" in value.scale.base
    assert not value.scale.warnings


def test_an_uneven_split_costs_what_it_says():
    value = found(gpus=3)
    (warning,) = value.scale.warnings
    assert "11% of the GPUs' time is lost. 2 divide a step evenly; 9 examples" in warning
    expected = (1 - value.scale.idle_share) * (1 - value.scale.waited_share)
    assert value.scale.efficiency == pytest.approx(expected, rel=0.01)


def test_more_gpus_than_examples_are_no_faster_than_as_many():
    many, enough = found(gpus=8, nodes=4), found(gpus=8)
    assert many.speed.tokens_per_second < enough.speed.tokens_per_second
    assert "the rest has nothing to do; 75% of the GPUs' time is lost" in many.scale.warnings[0]


def test_a_slow_network_costs_speed():
    rates = [
        found(gpus=8, nodes=2, network=gbits, gradient_accumulation_steps=16)
        for gbits in (1, 10, 100, 400)
    ]
    speeds = [value.speed.tokens_per_second for value in rates]
    assert speeds == sorted(speeds)
    assert rates[0].scale.waited_share > 0.5
    assert rates[-1].scale.waited_share < 0.25


def test_a_base_that_fits_no_one_gpu_is_spread_and_the_reason_told():
    value = found("llama-3.3-70b", gpus=8, nodes=4, gradient_accumulation_steps=64)
    assert value.fits
    said = value.scale.base
    assert said.startswith("sharded over the 8 GPUs of each node, 1/8 each (FSDP")
    assert "HSDP" in said
    assert "with all of it one GPU needs 137" in said
    assert value.scale.one_gpu_choices.endswith(
        "in host memory: the base, the inputs of 50 layers, the embedding"
    )
    for phase in ("training", "evaluation", "generation"):
        assert value.device_parts[phase]["two layers, gathered"] > 2**30
    assert sum(value.device_parts["training"].values()) == value.training.total_bytes
    # Eight processes of a machine, each with an embedding of its own.
    assert value.host["embedding"] == 8 * 2 * 128256 * 8192


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sharding": "on"}, "sharded over all 2 GPUs, 1/2 each (FSDP's full shard): sharding: on"),
        (
            {"weight_offload": "on"},
            "in host memory, once for every GPU, streamed: weight_offload: on",
        ),
        ({"sharding": "off", "memory_limit": "6GiB"}, "streamed: sharding: off"),
        ({"memory_limit": "4GiB"}, "streamed: sharded over 2 it does not fit either"),
        ({"memory_limit": "10GiB"}, "and may take 10GiB"),
        ({"memory_limit": "1GiB", "fused_layers": "off"}, "it does not fit one"),
    ],
)
def test_every_place_has_its_reason(values, said):
    assert said in found(gpus=2, **values).scale.base


def test_weights_that_a_slot_cannot_carry_are_waited_for():
    slow = found("llama-2-13b", "4090", gpus=4, gradient_accumulation_steps=4, sharding="on")
    assert slow.scale.waited_share > 0.2
    json.dumps(slow.as_dict())


def test_nothing_is_said_of_unknown_wires():
    recipe = Recipe(model="m", data="d", target_modules="all-linear")
    device = with_gpu_count(gpu_device(None, 40 * 2**30, "auto"), 2, None, None)
    value = forecast(recipe, shape_config("llama-2-7b"), device)
    assert value.scale.traffic.gradients_bytes > 0
    assert value.scale.efficiency is None
    assert value.scale.waited_share is None


H100 = Device("cuda", "H100", 80 * 2**30, "bfloat16", {"kind": "card"})


class Gathered(DistributedContext):
    def __init__(self, found):
        super().__init__(0, len(found), len(found))
        self.found = found

    def all_gather_object(self, thing):
        return self.found


def test_the_plan_is_for_the_smallest_gpu_of_all():
    assert shared_device(H100, SINGLE_PROCESS) is H100
    small = replace(H100, name="A100", memory_bytes=40 * 2**30)
    device = shared_device(H100, Gathered([H100, small]))
    assert device.memory_bytes == 40 * 2**30
    assert device.ranks == 2
    assert device.reasons["ranks"] == "1 x A100, 1 x H100"
    with pytest.raises(
        WorkError, match=r"different dtypes on the ranks: rank 0: bfloat16 on H100, rank 1"
    ):
        shared_device(H100, Gathered([H100, replace(H100, dtype="float16")]))
