"""What travels in a step, and over which wire, against the formulas written out."""

from dataclasses import replace

import pytest

from lorakit.planning.gpus import GPUS, gpu_device, with_gpu_count
from lorakit.planning.known_models import shape_config
from lorakit.planning.planner import plan_training
from lorakit.planning.throughput import NONE, traffic
from lorakit.recipe.schema import Recipe

TRAINED = 39_976_960  # LoRA r16 of Llama-2-7B
LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)


def sent(card="h100", gpus=1, nodes=1, network=None, **values):
    recipe = Recipe(**{"model": "m", "data": "d", "target_modules": "all-linear", **values})
    config = shape_config("llama-2-7b")
    device = with_gpu_count(gpu_device(GPUS[card], None, "auto"), gpus, nodes, network)
    return traffic(recipe, config, device, plan_training(recipe, config, device), GPUS[card])


def test_one_gpu_sends_nothing():
    assert sent() == NONE


@pytest.mark.parametrize(("gpus", "part"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_gradients_go_round_a_ring(gpus, part):
    found = sent(gpus=gpus)
    assert found.gradients_bytes == int(part * 4 * TRAINED)
    assert found.gradients_seconds == pytest.approx(part * 4 * TRAINED / 240e9)
    assert found.weights_bytes == 0
    assert "NVLink" in found.link


def test_the_slowest_link_counts():
    over_pcie = sent("4090", gpus=2)
    assert over_pcie.gradients_seconds == pytest.approx(4 * TRAINED / 12.5e9)
    assert "PCIe" in over_pcie.link
    between = sent(gpus=8, nodes=4)
    assert between.gradients_seconds == pytest.approx(2 * 31 / 32 * 4 * TRAINED / 12.5e9)
    assert "100 Gbit/s" in between.link
    faster = sent(gpus=8, nodes=4, network=400)
    assert faster.gradients_seconds == pytest.approx(between.gradients_seconds / 4)
    # A network faster than the slots leaves the slots as the slowest.
    assert "PCIe" in sent("t4", gpus=8, nodes=2, network=400).link
    # Nothing runs within a node of one GPU.
    assert "network" in sent("t4", gpus=1, nodes=2, network=400).link


@pytest.mark.parametrize(("method", "width"), [("lora", 2), ("qlora", 0.515869140625)])
def test_weights_are_gathered_twice_a_step_within_a_node(method, width):
    for nodes in (1, 4):
        found = sent(gpus=8, nodes=nodes, method=method, sharding="on")
        assert found.weights_bytes == pytest.approx(2 * 7 / 8 * width * LINEAR, rel=1e-6)
        assert found.weights_seconds == pytest.approx(found.weights_bytes / 240e9)


def test_seconds_of_unknown_wires_are_not_told():
    recipe = Recipe(model="m", data="d", target_modules="all-linear")
    config = shape_config("llama-2-7b")
    device = replace(gpu_device(None, 40 * 2**30, "auto"), ranks=2)
    found = traffic(recipe, config, device, plan_training(recipe, config, device), None)
    assert found.gradients_bytes == 4 * TRAINED
    assert found.gradients_seconds is None
